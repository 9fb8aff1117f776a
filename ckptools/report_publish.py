"""How publications and cards are shown: the plan of an upload, and what came of it."""

from __future__ import annotations

from ckptools.hub.licences import Licence
from ckptools.publication import Publication, Published
from ckptools.report import (
    _row,
    _show_table,
    _table,
    error_json,
    gigabytes,
    show_line,
    show_message,
)


def publication_json(publication: Publication) -> dict[str, object]:
    """The contract keys of `publish --dry-run`."""
    order, remote = publication.gathered.order, publication.remote
    licence, problem = publication.licence, publication.problem
    sent = sum(upload.nbytes for upload in publication.sent)
    return {
        **({"error": error_json(problem)} if problem else {}),
        "repo": remote.repo,
        "exists": remote.exists if remote.is_known else None,
        "visibility": publication.visibility,
        "revision": remote.branch,
        "parent_commit": remote.head or None,
        "pull_request": order.as_pull_request,
        "tag": {"name": order.tag, "action": publication.tag_action} if order.tag else None,
        "files": [
            {
                "path": row.upload.path,
                "bytes": row.upload.nbytes,
                "sha256": row.upload.sha256,
                "action": row.action,
            }
            for row in publication.rows
        ],
        "upload_bytes": sent if remote.is_known else None,
        "up_to_date": publication.is_up_to_date if remote.is_known else None,
        "card": publication.card,
        "license": _licence_json(licence),
        "notes": list(publication.notes),
    }


def card_json(text: str, licence: Licence) -> dict[str, object]:
    """The card, and why it names the licence it does."""
    return {"card": text, "license": _licence_json(licence)}


def _licence_json(licence: Licence) -> dict[str, object]:
    return {
        "id": licence.id,
        "name": licence.name,
        "link": licence.link,
        "refused": licence.refused,
        "why": list(licence.why),
        "parents": dict(licence.parents),
    }


def published_json(published: Published) -> dict[str, object]:
    """The plan, and the commit that came of it."""
    committed = published.committed
    return {
        **publication_json(published.publication),
        "commit": published.revision,
        "commit_url": committed.url if committed else None,
        "pull_request_url": (committed.pull_request or None) if committed else None,
        "verified": True,
    }


def show_publication(publication: Publication) -> None:
    """Where it goes, every file and what becomes of it, the licence, and the card."""
    order, remote = publication.gathered.order, publication.remote
    what: str = publication.visibility
    if not remote.exists:
        what += ", new" if remote.is_known else " if it is new; its state is not known"
    how = "a pull request to " if order.as_pull_request else ""
    at = f"; on top of {remote.head[:12]}" if remote.head else ""
    show_line(f"repository: {remote.repo} ({what})")
    show_line(f"commit to:  {how}branch {remote.branch}{at}")
    if order.tag:
        there = {"same": " (it is there)", "unknown": " (if there is none)"}.get(
            publication.tag_action, ""
        )
        show_line(f"tag:        {order.tag}{there}")
    table = _table("file", "size", "sha256", "action", numbers=(1,), names=(0,))
    for row in publication.rows:
        _row(table, row.upload.path, gigabytes(row.upload.nbytes), row.upload.sha256[:16],
             row.action)  # fmt: skip
    _show_table(table)
    licence = publication.licence
    why = [licence.refused, *licence.why] if licence.refused else licence.why
    name = "open" if licence.refused else licence.name or licence.id
    show_line(f"licence: {name} ({'; '.join(why)})")
    sent = sum(upload.nbytes for upload in publication.sent)
    if publication.is_up_to_date:
        show_line("up to date: nothing to send")
    else:
        most = "" if remote.is_known else "at most "
        show_line(f"to send: {most}{gigabytes(sent)} in one commit")
    for note in publication.notes:
        show_line(f"note: {note}")
    show_line("")
    show_line("README.md:")
    for line in publication.card.splitlines():
        show_line(f"  {line}".rstrip())


def show_published(published: Published) -> None:
    """What was done, in a few lines."""
    publication, committed = published.publication, published.committed
    repo = publication.remote.repo
    for note in publication.notes:
        show_message(f"note: {note}")
    if committed is None:
        show_line(f"{repo} is up to date at {published.revision[:12]}")
    elif committed.pull_request:
        show_line(f"opened {committed.pull_request}")
    else:
        show_line(f"published {repo} at {published.revision[:12]} ({publication.visibility})")
        show_line(f"  {committed.url}")
    files = len(publication.rows)
    sent = sum(upload.nbytes for upload in publication.sent) if committed else 0
    show_line(f"  {files} files, {gigabytes(sent)} of them new; the Hub's hashes are those here")
    if tag := publication.gathered.order.tag:
        show_line(f"  tag {tag}")


def show_card(text: str) -> None:
    """The card, line by line, as a file on stdout."""
    for line in text.splitlines():
        show_line(line)
