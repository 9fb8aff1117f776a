"""Publishing a finished model: what goes to the Hub, what speaks against it, and the sending.

gather (local facts) ──▶ plan (what the Hub has) ──▶ publish (upload, one commit, check, tag)

Nothing is sent before a plan stands, and nothing that names this machine is sent at all.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ckptools.checkpoint import is_index, shards_of
from ckptools.errors import (
    CkptError,
    InputError,
    NetworkError,
    UnsafeError,
    UsageError,
    VerificationError,
)
from ckptools.family import Detection, load_families
from ckptools.hashing import FileHashes, Progress, hash_source
from ckptools.hub import is_offline
from ckptools.hub.card import Facts, Parent, Picture, Weights, card_licence, make_card
from ckptools.hub.licences import Licence, inherit
from ckptools.hub.upload import (
    Action,
    Committed,
    Hub,
    MovedError,
    Remote,
    Upload,
    card_facts,
    check_arrived,
    check_name,
    commit,
    full_name,
    look,
    prepare,
    set_tag,
    tag_taken,
    who,
)
from ckptools.hubref import (
    cached_ref,
    is_hub_text,
    is_local,
    is_revision,
    parse_hub_ref,
    shown,
)
from ckptools.manifest import merge_id, names_local_path, without_addresses, written_formula
from ckptools.pickles import is_pickle
from ckptools.soundness import verify_source
from ckptools.sources import open_checkpoint
from ckptools.writer import MANIFEST_SUFFIX

if TYPE_CHECKING:
    from ckptools.recipe import Recipe

CARD = "README.md"
RECIPE = "recipe.yaml"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
_SMALL_BYTES = 50_000_000  # of what is no weights: pictures, texts
_HUGE_BYTES = 500_000_000_000  # the Hub takes no larger file
_MOVES = 5
_TELLING = 5  # characters: shorter names stand in many texts by chance
_TEXTS = (".md", ".json", ".yaml", ".yml", ".html", ".txt", ".py")
_RENDERED = (".png", ".html", ".json")
_UNCHECKED = "mend it, or publish it as it is with --force-unchecked"


@dataclass(frozen=True)
class Order:
    """What the user wants.

    repo             `owner/name` or `name`
    license          as given; "" inherits the parents'
    licenses, hub    model name of the recipe -> its licence, its `owner/name` on the Hub
    force_unchecked  publish what did not pass `verify` or its test render
    renders          the folder of its test render; None: the one beside it
    recipe           that stands for the model; None where the model itself was named
    """

    repo: str = ""
    public: bool = False
    branch: str = "main"
    tag: str = ""
    message: str = ""
    as_pull_request: bool = False
    license: str = ""
    license_link: str = ""
    licenses: Mapping[str, str] | None = None
    hub: Mapping[str, str] | None = None
    tags: tuple[str, ...] = ()
    title: str = ""
    description: str = ""
    force_unchecked: bool = False
    renders: Path | None = None
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Gathered:
    """All that this machine knows of the model to publish.

    uploads  every file but the card
    facts    of the card; its repository is filled in by the plan
    own      the licence that the file's own metadata names
    notes    what is worth knowing
    """

    path: Path
    order: Order
    uploads: tuple[Upload, ...]
    facts: Facts
    own: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One file of the plan."""

    upload: Upload
    action: Action


@dataclass(frozen=True)
class Publication:
    """What publishing would do, against the repository as it is now.

    visibility  that the repository has or will have
    tag_action  "add", "same", "unknown", or "" without a tag
    problem     why nothing is known of the repository, where the Hub did not answer
    """

    gathered: Gathered
    remote: Remote
    visibility: Literal["private", "public"]
    card: str
    licence: Licence
    rows: tuple[Row, ...]
    tag_action: str
    notes: tuple[str, ...]
    problem: NetworkError | None = None

    @property
    def sent(self) -> tuple[Upload, ...]:
        """What is not there yet."""
        return tuple(row.upload for row in self.rows if row.action != "same")

    @property
    def is_up_to_date(self) -> bool:
        """Whether there is nothing to do."""
        return not self.sent and self.tag_action != "add" and self.remote.exists


@dataclass(frozen=True)
class Published:
    """What publishing did; `committed` is None where all files were there already."""

    publication: Publication
    committed: Committed | None
    revision: str


def order_of(recipe: Recipe) -> Order:
    """What a recipe's `publish:` says, and where its `render:` puts pictures."""
    said, folder = recipe.publish, recipe.render.folder if recipe.render else ""
    renders = recipe.beside(folder) if folder else None
    if said is None:
        return Order(renders=renders, recipe=recipe)
    return Order(
        renders=renders, recipe=recipe,
        repo=said.repo, public=said.public, branch=said.branch or "main", tag=said.tag,
        license=said.license, license_link=said.license_link, licenses=said.licenses,
        hub=said.hub, tags=said.tags, title=said.title, description=said.description,
    )  # fmt: skip


# --- this machine ------------------------------------------------------------------------------


def gather(path: Path, order: Order, *, progress: Progress | None = None) -> Gathered:
    """Check, hash and describe the model at `path`; asks nobody.

    path  a `.safetensors` file, the index of shards, or a diffusers folder
    Raises `UnsafeError` for pickles, `VerificationError` for what is not sound or failed its test
    render (unless `order.force_unchecked`), `UnsafeError` for what would name this machine.
    """
    path = path if path.name not in ("", "..") else path.resolve()
    files = _files_of(path)
    detection, notes = _check(path, order)
    hashes = hash_source(path, progress=progress)
    by_path = {file.path.resolve(): file for file in hashes.files}
    weights = {
        name: by_path[file.resolve()] for name, file in files.items() if file.resolve() in by_path
    }
    manifest = _manifest(path)
    uploads = [
        Upload(name, weights[name].path, weights[name].nbytes, weights[name].sha256, "")
        if name in weights
        else small(name, file)
        for name, file in files.items()
    ]
    uploads += _beside(path, manifest)
    drawn = _drawn(path, order, {file.sha256 for file in weights.values()}, manifest)
    uploads += drawn.uploads
    if path.is_dir() and (path / CARD).is_file():
        notes.append(f"{CARD} of the folder is not sent: the card is written to the repository's")
    notes += [*drawn.notes, *_recipe_notes(order.recipe, manifest)]
    uploads += [small(RECIPE, _yaml(manifest["recipe"]))] if "recipe" in manifest else []
    _check_private(path, uploads, weights, order)
    facts = _facts(path, order, weights, manifest, drawn, detection)
    with open_checkpoint(path) as checkpoint:
        own = checkpoint.metadata.get("modelspec.license", "")
    return Gathered(path, order, tuple(uploads), facts, own, tuple(notes))


def small(name: str, source: Path | bytes) -> Upload:
    """An upload of a small file, which git or the Hub may keep."""
    data = source if isinstance(source, bytes) else _read(source)
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return Upload(name, data, len(data), hashlib.sha256(data).hexdigest(), git)


def _read(path: Path) -> bytes:
    if path.stat().st_size > _SMALL_BYTES:
        raise InputError(
            f"a file of {path.stat().st_size:,} bytes that is no weights", where=str(path),
            fix="move it out of the folder",
        )  # fmt: skip
    return path.read_bytes()


def _files_of(path: Path) -> dict[str, Path]:
    """Path in the repository -> file, of the model itself."""
    if not is_local(path):
        raise UsageError(
            "what is published is a model of this machine", where=shown(path),
            fix="it is on the Hub already; download it to publish it elsewhere",
        )  # fmt: skip
    if not path.exists():
        raise InputError("no such file", where=str(path), fix="check the path")
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise InputError(
                "not a diffusers folder: it has no model_index.json", where=str(path),
                fix="give the .safetensors file",
            )  # fmt: skip
        found = {
            file.relative_to(path).as_posix(): file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and file.name != CARD
        }
    elif is_index(path.name):
        found = {name: path.parent / name for name in (path.name, *shards_of(path))}
    else:
        found = {path.name: path}
    for name, file in found.items():
        if path.is_dir():
            _check_inside(path, file)
        if name.lower().endswith(_PICKLES) or (name.endswith(".safetensors") and is_pickle(file)):
            raise UnsafeError(
                "a pickle, which may run code where it is loaded, is not published",
                where=str(file),
                fix="make it safetensors: `ckptools convert`",
            )
        if file.stat().st_size > _HUGE_BYTES:
            raise InputError(
                "the Hub takes no file above 500 GB", where=str(file),
                fix="merge again with `shard_size: 5GB`",
            )  # fmt: skip
    return found


def _check_inside(folder: Path, file: Path) -> None:
    """Refuse a file of a folder that lies elsewhere by a link: it may be anything.

    The Hub's cache links to blobs beside its snapshots, which are the folder's own.
    """
    own, target = folder.resolve(), file.resolve()
    blobs = own.parent.parent / "blobs" if cached_ref(own) else own
    if not target.is_relative_to(own) and not target.is_relative_to(blobs):
        raise UnsafeError(
            "a link that leaves the folder is not followed",
            where=str(file),
            fix="put the file itself there, or remove the link",
        )


def _check(path: Path, order: Order) -> tuple[Detection | None, list[str]]:
    """What the model is, and what `verify` warns of; an error for what it finds wrong."""
    found = verify_source(path, deep=True)
    if found.problems and not order.force_unchecked:
        error = UnsafeError if found.unsafe else VerificationError
        first, more = found.problems[0], len(found.problems) - 1
        raise error(
            f"not sound: {first.message}" + (f", and {more} more problems" if more else ""),
            where=first.tensor or path.name,
            fix=f"`ckptools verify {path.name} --deep` tells all; {_UNCHECKED}",
        )
    words = [f"unchecked: {problem.message}" for problem in found.problems]
    return found.detection, [*words, *(warning.message for warning in found.warnings)]


def _stem(path: Path) -> str:
    return path.name.removesuffix(".safetensors").removesuffix(".safetensors.index.json")


def _manifest(path: Path) -> dict[str, Any]:
    """The merge's manifest; {} where there is none. One that cannot be read fails `verify`."""
    single = path.with_name(path.name.removesuffix(".index.json") + MANIFEST_SUFFIX)
    try:
        document = json.loads(single.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(document, dict) or not document.get("recipe"):
        return {}
    _check_manifest(document, single)
    return document


def _check_manifest(document: Mapping[str, Any], path: Path) -> None:
    """What a card takes from it has the types that a merge writes."""
    try:
        for one in document.get("inputs", []):
            _ = str(one["name"]), str(one["file"]), int(one.get("bytes", 0))
        dict(document["recipe"]["models"])
    except (TypeError, ValueError, KeyError, AttributeError) as exc:
        raise InputError(
            "this is no manifest of a merge any more", where=str(path),
            fix="merge again; `ckptools verify` tells what it says of the file",
        ) from exc  # fmt: skip


def _beside(path: Path, manifest: Mapping[str, Any]) -> list[Upload]:
    """The manifest and the licence text that lie beside the model."""
    found: list[Upload] = []
    if manifest:
        name = path.name.removesuffix(".index.json") + MANIFEST_SUFFIX
        found.append(small(name, path.with_name(name)))
    for text in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        if (path.parent / text).is_file():
            found.append(small(text, path.parent / text))
            break
    return found


def _report(renders: Path) -> dict[str, Any]:
    """What a test render found out; {} where there is none."""
    try:
        report = json.loads((renders / "report.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) and isinstance(report.get("models"), dict) else {}


@dataclass(frozen=True)
class _Drawn:
    """The test render of a model: its report, what that calls the model, and its files."""

    report: Mapping[str, Any]
    label: str = ""
    uploads: tuple[Upload, ...] = ()
    notes: tuple[str, ...] = ()


def _drawn(path: Path, order: Order, sha256s: set[str], manifest: Mapping[str, Any]) -> _Drawn:
    """The test render of exactly these weights; one that failed is a `VerificationError`."""
    folder = order.renders or path.parent / f"{_stem(path)}-render"
    report = _report(folder)
    label = _own_label(report, sha256s, manifest)
    if not label:
        other = f"{folder.name}/ shows other weights than these, and is not published; "
        told = other if report else "not rendered: "
        return _Drawn({}, notes=(f"{told}`ckptools render` shows whether it still draws",))
    if report.get("verdict") == "fail" and not order.force_unchecked:
        raise VerificationError(
            "the test render of this model failed",
            where=f"{folder.name}/report.json",
            fix=_UNCHECKED,
        )
    files = (file for file in sorted(folder.iterdir()) if file.suffix in _RENDERED)
    found = tuple(small(f"renders/{file.name}", file) for file in files if file.is_file())
    return _Drawn(report, label, found)


def _own_label(report: Mapping[str, Any], sha256s: set[str], manifest: Mapping[str, Any]) -> str:
    """What a test render calls this model; "" where it did not draw it.

    A merge that was drawn before it was saved is known by its recipe and its inputs.
    """
    inputs = [
        (str(one.get("name")), str(one.get("header_sha256"))) for one in manifest.get("inputs", [])
    ]
    own_id = merge_id(manifest["recipe"], inputs) if manifest else ""
    for label, facts in report.get("models", {}).items():
        drawn = facts.get("sha256")
        if set(drawn) == sha256s if drawn else own_id and facts.get("merge_id") == own_id:
            return str(label)
    return ""


def _recipe_notes(recipe: Recipe | None, manifest: Mapping[str, Any]) -> list[str]:
    """What a recipe says otherwise than the merge that was made of it."""
    if recipe is None or not manifest:
        return []
    says = json.loads(json.dumps(written_formula(recipe)))
    differing = [
        key for key in ("merge", "let", "params") if says.get(key) != manifest["recipe"].get(key)
    ]
    if not differing:
        return []
    return [
        f"{recipe.path.name} has another {' and '.join(f'`{key}`' for key in differing)} than the "
        "file was merged with; what is published tells of the file"
    ]


def _yaml(recipe: object) -> bytes:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100).encode()


def _facts(
    path: Path,
    order: Order,
    weights: Mapping[str, FileHashes],
    manifest: Mapping[str, Any],
    drawn: _Drawn,
    detection: Detection | None,
) -> Facts:
    family = detection.family or "" if detection else ""
    recipe = manifest.get("recipe", {})
    names = {upload.path for upload in drawn.uploads}
    title = order.title or _stem(path)
    return Facts(
        repo="",
        title=title,
        weights=tuple(
            Weights(name, file.nbytes, file.sha256, file.autov2, file.autov3 or "")
            for name, file in weights.items()
        ),
        family=family,
        family_title=load_families()[family].title if family in load_families() else "",
        variant=(detection.variant or "") if detection else "",
        prediction=(detection.prediction or "") if detection else "",
        kind=detection.kind if detection else "unknown",
        formula=str(recipe.get("merge", "")),
        params={
            str(name): lines if isinstance(lines, dict) else {"default": lines}
            for name, lines in recipe.get("params", {}).items()
        },
        parents=tuple(_parents(order, manifest)),
        recipe=RECIPE if recipe else "",
        output=str(recipe.get("output", {}).get("path", path.name)),
        pictures=tuple(_pictures(drawn.report, names, drawn.label)),
        sheet="renders/sheet.png" if "renders/sheet.png" in names else "",
        verdict=str(drawn.report.get("verdict") or ""),
        is_folder=path.is_dir(),
        tags=order.tags,
        description=order.description,
    )


def _parents(order: Order, manifest: Mapping[str, Any]) -> list[Parent]:
    """The merge's inputs, as the manifest and the recipe in it name them."""
    recipe = manifest.get("recipe", {})
    sources = dict(recipe.get("models", {}))
    sources |= {f"loras[{n}]": entry for n, entry in enumerate(recipe.get("loras", []))}
    known, licences = dict(order.hub or {}), dict(order.licenses or {})
    parents = []
    for entry in manifest.get("inputs", []):
        name = str(entry["name"])
        source = sources.get(name, {})
        source = source if isinstance(source, dict) else {"path": source}
        hub, revision, file = known.get(name, ""), "", str(entry["file"])
        text = str(source.get("path", ""))
        if is_hub_text(text):
            ref = parse_hub_ref(text, str(source.get("revision", "")))
            hub, revision, file = ref.repo, ref.revision, ref.file or file
        parents.append(
            Parent(
                name=name,
                file=file,
                hub=hub,
                revision=revision,
                sha256=str(entry.get("sha256") or source.get("sha256") or ""),
                licence=licences.get(name) or str(entry.get("license") or ""),
                nbytes=int(entry.get("bytes", 0)),
            )
        )
    return parents


def _pictures(report: Mapping[str, Any], names: set[str], own: str) -> list[Picture]:
    return [
        Picture(
            path=f"renders/{image['file']}",
            model=str(image["model"]),
            prompt=str(image.get("prompt") or ""),
            seed=int(image.get("seed") or 0),
            is_merge=image["model"] == own,
        )
        for image in report.get("images", [])
        if f"renders/{image['file']}" in names
    ]


# --- nothing of this machine -------------------------------------------------------------------


def _check_private(
    path: Path, uploads: Sequence[Upload], weights: Mapping[str, FileHashes], order: Order
) -> None:
    """Refuse files that hold a local path, this machine's name or its user's folders."""
    for upload in uploads:
        if upload.path in weights or not isinstance(upload.source, bytes):
            continue
        if leak := _leak(upload.path, upload.source, path, order):
            raise UnsafeError(
                f"{leak} of this machine is in the file, and would be published",
                where=upload.path,
                fix="remove it there",
            )
    with open_checkpoint(path) as checkpoint:
        headers = [checkpoint.metadata, *(file.header.metadata for file in checkpoint.files)]
    metadata = "\n".join(f"{key} {value}" for entries in headers for key, value in entries.items())
    leak = _leak("metadata.txt", metadata.encode(errors="replace"), path, order)
    if leak and not order.force_unchecked:
        raise UnsafeError(
            f"{leak} of this machine is in the metadata, and would be published",
            where=path.name,
            fix="write the file again without that entry, or use --force-unchecked",
        )


def _leak(name: str, data: bytes, path: Path, order: Order) -> str:
    """What a file tells of this machine, in a word; "" for nothing.

    The owner of the repository is no secret, whatever the user is called here.
    """
    folders = {str(path.resolve().parent), str(Path.home())}
    long = [re.escape(folder).encode() for folder in folders if len(folder) >= _TELLING]
    if long and re.search(rb"(?:%b)(?![\w.-])" % b"|".join(long), data):
        return "a path"
    if not name.endswith(_TEXTS):
        return ""
    text = data.decode("utf-8", errors="replace")
    if not name.endswith(".html") and names_local_path(text):
        return "a path"
    words = {"the name": socket.gethostname(), "the user's name": _user()}
    text = without_addresses(text)
    for what, word in words.items():
        if word == order.repo.partition("/")[0]:
            continue
        if len(word) >= _TELLING and re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w.-])", text):
            return what
    return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a user entry
        return ""


# --- the plan ----------------------------------------------------------------------------------


def make_card_alone(gathered: Gathered) -> tuple[str, Licence]:
    """The card as a new repository would get it, and what was found out about the licence."""
    licence = _licence(gathered, gathered.facts.parents, "")
    return make_card(replace(gathered.facts, repo=gathered.order.repo), licence), licence


def make_publication(gathered: Gathered, hub: Hub, *, dry_run: bool = False) -> Publication:
    """Compare what is here with what the Hub has; sends nothing.

    dry_run  also works for users who are not logged in, and without the Hub: then as far as the
             plan is known, with the `problem`; none where `HF_HUB_OFFLINE` asks for that
    Raises `UnsafeError` for a public repository without `--public`, `UsageError` where the licence
    is open, `NetworkError`.
    """
    order = gathered.order
    if not order.repo:
        raise UsageError("no repository is named", fix="give --repo owner/name")
    if order.as_pull_request and order.tag:
        raise UsageError("a pull request cannot be tagged", fix="tag it when it is merged")
    check_name(order.repo)
    for word in (order.branch, order.tag):
        if word and not is_revision(word):
            raise UsageError(
                f"{word!r} is no name of a branch or tag", fix="use letters and digits"
            )
    if dry_run and is_offline():
        return _make_unknown(gathered, None)
    try:
        if not dry_run:
            who(hub)
        repo = full_name(hub, order.repo)
        names = [upload.path for upload in gathered.uploads]
        remote = look(hub, repo, order.branch, names)
    except NetworkError as exc:
        if not dry_run:
            raise
        return _make_unknown(gathered, exc)
    if order.as_pull_request and not remote.exists:
        raise NetworkError(f"there is no repository {repo} to open a pull request in",
                           fix="publish without --pr")  # fmt: skip
    if remote.private is False and not order.public and not order.as_pull_request:
        raise UnsafeError(f"{repo} is public", fix="give --public to publish there")
    notes = [*gathered.notes]
    if remote.private and order.public:
        notes.append(f"{repo} is private and stays so; its settings on the Hub change that")
    parents = _with_hub_licences(gathered.facts.parents, hub)
    licence = _licence(gathered, parents, remote.readme)
    if licence.refused:
        raise UsageError(
            f"{licence.refused}" + "".join(f"; {reason}" for reason in licence.why),
            where="licence",
            fix="give --license with the one that this merge may carry",
        )
    facts = replace(gathered.facts, repo=repo, parents=parents)
    _check_card(gathered, make_card(facts, licence))
    card = make_card(facts, licence, remote.readme)
    uploads = (*gathered.uploads, small(CARD, card.encode()))
    tagged = remote.tags.get(order.tag, "")
    rows = tuple(Row(upload, remote.action(upload)) for upload in uploads)
    moves = any(row.action != "same" for row in rows)
    if tagged and (moves or tagged != remote.head):
        raise tag_taken(repo, order.tag)
    tag_action = ("same" if tagged else "add") if order.tag else ""
    is_public = not remote.private if remote.exists else order.public
    return Publication(
        gathered=gathered,
        remote=remote,
        visibility="public" if is_public else "private",
        card=card,
        licence=licence,
        rows=rows,
        tag_action=tag_action,
        notes=tuple(notes),
    )


def _check_card(gathered: Gathered, card: str) -> None:
    """Refuse a card that our own words make tell of this machine; its owner's are there already."""
    if leak := _leak(CARD, card.encode(), gathered.path, gathered.order):
        raise UnsafeError(
            f"{leak} of this machine is in the card, and would be published",
            where=CARD,
            fix="look at `ckptools card`; title, description and names of files come from you",
        )


def _make_unknown(gathered: Gathered, problem: NetworkError | None) -> Publication:
    """The plan as far as this machine knows it."""
    order, facts = gathered.order, gathered.facts
    licence = _licence(gathered, facts.parents, "")
    card = make_card(replace(facts, repo=order.repo), licence)
    _check_card(gathered, card)
    uploads = (*gathered.uploads, small(CARD, card.encode()))
    asked = "did not answer" if problem else "was not asked (HF_HUB_OFFLINE)"
    notes = [
        *gathered.notes,
        f"the Hub {asked}: whether {order.repo} is there, public, or up to date is not known",
        "words of its owner in a card that is there stay; they are not in this one",
    ]
    if any(parent.hub and not parent.licence for parent in facts.parents):
        notes.append("licences of parents on the Hub were not looked up")
    return Publication(
        gathered=gathered,
        remote=Remote(order.repo, order.branch, is_known=False),
        visibility="public" if order.public else "private",
        card=card,
        licence=licence,
        rows=tuple(Row(upload, "unknown") for upload in uploads),
        tag_action="unknown" if order.tag else "",
        notes=tuple(notes),
        problem=problem,
    )


def _with_hub_licences(parents: Sequence[Parent], hub: Hub) -> tuple[Parent, ...]:
    """Parents with the licences that their own cards on the Hub name, where none was known."""
    found = []
    for parent in parents:
        licence = parent.licence
        if not licence and parent.hub:
            try:
                licence, _ = card_facts(hub, parent.hub)
            except CkptError as exc:
                hub.tell(f"the licence of {parent.hub} cannot be read: {exc.what}")
        found.append(replace(parent, licence=licence))
    return tuple(found)


def _licence(gathered: Gathered, parents: Sequence[Parent], existing: str) -> Licence:
    given, link = gathered.order.license, gathered.order.license_link
    licences = {parent.name: parent.licence for parent in parents}
    licence = inherit(licences, given=given, link=link, own=gathered.own)
    if licence.refused and existing:  # decided at an earlier publication
        given, theirs = card_licence(existing)
        if given:
            return inherit(licences, given=given, link=link or theirs)
    return licence


# --- the sending -------------------------------------------------------------------------------


def publish(gathered: Gathered, hub: Hub) -> Published:
    """Upload what is missing and commit it all at once; nothing is seen before, or half.

    Plans again where somebody else committed meanwhile, and where the answer to the commit was
    lost: then it may already be done. At the end the Hub's hashes are those of the files here.
    """
    order = gathered.order
    publication = make_publication(gathered, hub)
    committed: Committed | None = None
    for _ in range(_MOVES):
        remote = publication.remote
        if not publication.sent:
            break
        prepare(hub, remote, private=not order.public)
        if not remote.exists or (not remote.has_branch and order.branch != "main"):
            publication = make_publication(gathered, hub)
        try:
            committed = commit(
                hub, publication.remote, publication.sent,
                message=order.message or f"Publish {gathered.facts.title}",
                as_pull_request=order.as_pull_request,
            )  # fmt: skip
            break
        except MovedError as exc:
            hub.tell(f"{exc.what}; looking again")
            publication = make_publication(gathered, hub)
    else:
        raise NetworkError(
            f"{publication.remote.repo} changes all the time", fix="try again when it is quiet"
        )
    repo = publication.remote.repo
    revision = committed.oid if committed else publication.remote.head
    check_arrived(hub, repo, revision, [row.upload for row in publication.rows])
    if order.tag:
        set_tag(hub, repo, order.tag, revision)
    return Published(publication, committed, revision)
