"""Sends files to the Hub in one commit: what is there already, what is sent, what can go wrong.

Knows repositories, files and commits; nothing of models, cards or licences. The token is the Hub's
own login or `HF_TOKEN`; it is never taken from elsewhere, and never shown.

What `huggingface_hub` 2.4.0 does not do by itself: a commit is not repeated after a 503; without
Xet on the other side an upload fails instead of going over LFS; requests have no time limit.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ckptools.errors import CkptError, NetworkError, UsageError, VerificationError
from ckptools.hub import require_client

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

Action = Literal["add", "update", "same", "unknown"]
T = TypeVar("T")

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_TRIES, _TRIES_FOR_A_LOOK = 6, 2
_LONGEST_WAIT_S, _WAIT_FOR_A_LOOK_S = 60.0, 3.0
_CONNECT_S, _SILENCE_S = 15.0, 120.0
_CONNECT_FOR_A_LOOK_S, _SILENCE_FOR_A_LOOK_S = 4.0, 15.0  # each of its addresses is tried
_LOGIN = "run `hf auth login`, or set HF_TOKEN"
_AGAIN = "run the same command again: what is uploaded is not sent twice"


@dataclass(frozen=True)
class Upload:
    """One file for the repository.

    path     within the repository
    source   where it lies, or its bytes
    git_oid  what git calls it; "" for weights, which git does not keep
    """

    path: str
    source: Path | bytes
    nbytes: int
    sha256: str
    git_oid: str


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository: its sha256 where it is kept outside git, else ""."""

    nbytes: int
    git_oid: str
    sha256: str

    def is_same(self, upload: Upload) -> bool:
        """Whether it has the content of `upload`."""
        if self.sha256:
            return self.sha256 == upload.sha256
        return self.git_oid == upload.git_oid and self.nbytes == upload.nbytes


@dataclass(frozen=True)
class Remote:
    """A repository as it is now.

    private   None where there is no repository, or it cannot be seen
    head      the commit that the branch points at; of `main` where the branch is yet to be made
    readme    of that commit; "" where it has none
    is_known  False where the Hub was not asked, or did not answer: then nothing is known of it
    """

    repo: str
    branch: str
    is_known: bool = True
    private: bool | None = None
    head: str = ""
    has_branch: bool = False
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    readme: str = ""

    @property
    def exists(self) -> bool:
        """Whether there is such a repository."""
        return self.private is not None

    def action(self, upload: Upload) -> Action:
        """What is to be done about a file."""
        there = self.files.get(upload.path)
        if not self.is_known:
            return "unknown"
        if there is None:
            return "add"
        return "same" if there.is_same(upload) else "update"


@dataclass(frozen=True)
class Committed:
    """A commit that the Hub accepted."""

    oid: str
    url: str
    pull_request: str


class MovedError(CkptError):
    """The branch is no longer where the plan saw it, or it is unknown whether it is."""

    code = "moved"


@dataclass
class Hub:
    """The Hub, as one user.

    sleep    waits so many seconds; tests give another
    tell     is told, in a sentence, of what goes otherwise than planned
    patient  whether a Hub that is busy or silent is waited for: for a look it is not
    """

    api: HfApi
    tell: Callable[[str], None]
    sleep: Callable[[float], None] = time.sleep
    patient: bool = True

    @property
    def has_token(self) -> bool:
        """Whether somebody is logged in."""
        from huggingface_hub import get_token

        return bool(self.api.token or get_token())

    def call(self, action: Callable[[], T], what: str) -> T:
        """The action's result, tried again where the Hub is busy; else a `NetworkError`.

        what  is done, for the message: "look at me/model"
        """
        tries = _TRIES if self.patient else _TRIES_FOR_A_LOOK
        for attempt in range(1, tries + 1):
            try:
                return action()
            except _failures() as exc:
                response = _response(exc)
                is_given_up = not self.patient and response is None
                if attempt == tries or is_given_up or not _is_passing(exc):
                    raise network_error(exc, what) from exc
                self._wait(attempt, response, what)
        raise AssertionError("the last try returns or raises")

    def _wait(self, attempt: int, response: Any, what: str) -> None:
        seconds = _retry_after(response)
        if seconds is None:
            seconds = min(_LONGEST_WAIT_S, 2.0**attempt) * random.uniform(0.5, 1.0)
        if not self.patient:
            seconds = min(seconds, _WAIT_FOR_A_LOOK_S)
        said = f"the Hub answers {response.status_code}" if response is not None else "no answer"
        self.tell(f"{said} ({what}); trying again in {seconds:.0f} s")
        self.sleep(seconds)


def connect(tell: Callable[[str], None], *, quiet: bool = False, patient: bool = True) -> Hub:
    """The Hub of `HF_ENDPOINT`, with the user's own login; asks nothing yet.

    quiet    whether the client's progress bars stay away
    patient  as `Hub` has it
    """
    require_client()
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    _limit_times(patient=patient)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # `tell` says what matters
    if quiet:
        disable_progress_bars()
    return Hub(HfApi(library_name="ckptools"), tell, patient=patient)


def _limit_times(*, patient: bool) -> None:
    """Let requests end where nothing arrives; the client itself would wait for ever."""
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    silence_s, connect_s = (
        (_SILENCE_S, _CONNECT_S) if patient else (_SILENCE_FOR_A_LOOK_S, _CONNECT_FOR_A_LOOK_S)
    )
    timeout = type(get_session().timeout)(silence_s, connect=connect_s)

    def factory() -> Any:
        client = default_client_factory()
        client.timeout = timeout
        return client

    set_client_factory(factory)


# --- what is there -----------------------------------------------------------------------------


def check_name(repo: str) -> None:
    """Raise `UsageError` for what can be no repository's name; asks nobody."""
    name = repo if "/" in repo else f"me/{repo}"
    if not _REPO.fullmatch(name) or ".." in name or "--" in name:
        raise UsageError(f"{repo!r} is no name of a repository", fix="give --repo owner/name")


def full_name(hub: Hub, repo: str) -> str:
    """`owner/name`; a bare name is the user's own. Raises `UsageError` for no name at all."""
    check_name(repo)
    return repo if "/" in repo else f"{who(hub)}/{repo}"


def who(hub: Hub) -> str:
    """The user's name. Raises `NetworkError` where nobody is logged in or may only read."""
    if not hub.has_token:
        raise NetworkError("nobody is logged in to the Hub", fix=_LOGIN)
    user = hub.call(lambda: hub.api.whoami(cache=True), "ask who is logged in")
    role = user.get("auth", {}).get("accessToken", {}).get("role", "")
    if role == "read":
        raise NetworkError(
            "the token may only read", fix="make one that may write, then run `hf auth login`"
        )
    return str(user["name"])


def look(hub: Hub, repo: str, branch: str, paths: Sequence[str]) -> Remote:
    """The repository as it is now, with the files that stand at `paths`; changes nothing."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    def info() -> Any:
        try:
            return hub.api.model_info(repo)
        except RepositoryNotFoundError:
            return None
        except HfHubHTTPError as exc:  # how the Hub hides what an unknown user may not see
            if exc.response.status_code == 401 and not hub.has_token:
                return None
            raise

    doing = f"look at {repo}"
    found = hub.call(info, doing)
    if found is None:
        return Remote(repo, branch)
    refs = hub.call(lambda: hub.api.list_repo_refs(repo), doing)
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    head = branches.get(branch) or branches.get("main") or str(found.sha)
    files = _files(hub, repo, [*paths, "README.md"], head)
    return Remote(
        repo=repo,
        branch=branch,
        private=bool(found.private),
        head=head,
        has_branch=branch in branches,
        files=files,
        tags={ref.name: ref.target_commit for ref in refs.tags},
        readme=_readme(hub, repo, head) if "README.md" in files else "",
    )


def _files(hub: Hub, repo: str, paths: Sequence[str], revision: str) -> dict[str, RemoteFile]:
    """The files that stand at these paths."""
    from huggingface_hub.hf_api import RepoFile

    rows = hub.call(
        lambda: hub.api.get_paths_info(repo, [*paths], revision=revision), f"look at {repo}"
    )
    return {
        row.path: RemoteFile(row.size, row.blob_id, row.lfs.sha256 if row.lfs else "")
        for row in rows
        if isinstance(row, RepoFile)
    }


def _readme(hub: Hub, repo: str, revision: str) -> str:
    from huggingface_hub import get_session
    from huggingface_hub.utils._http import hf_raise_for_status

    def get() -> str:
        url = f"{hub.api.endpoint}/{repo}/resolve/{revision}/README.md"
        headers = hub.api._build_hf_headers()
        answer = get_session().get(url, headers=headers)
        hf_raise_for_status(answer)
        return str(answer.content.decode("utf-8", errors="replace"))

    return hub.call(get, f"read the card of {repo}")


def card_facts(hub: Hub, repo: str) -> tuple[str, bool]:
    """(licence as its card says or "", whether it is gated) of another's repository."""
    info = hub.call(lambda: hub.api.model_info(repo), f"look at {repo}")
    data = info.card_data
    licence = str((data.get("license") if data else "") or "")
    name = str((data.get("license_name") if data else "") or "")
    return (name or licence if licence == "other" else licence), bool(info.gated)


# --- what is sent ------------------------------------------------------------------------------


def prepare(hub: Hub, remote: Remote, *, private: bool) -> None:
    """Make the repository and the branch where they are missing."""
    if not remote.exists:
        hub.call(
            lambda: hub.api.create_repo(remote.repo, private=private, exist_ok=True),
            f"create {remote.repo}",
        )
    if not remote.has_branch and remote.branch != "main":
        hub.call(
            lambda: hub.api.create_branch(
                remote.repo, branch=remote.branch, revision=remote.head or None, exist_ok=True
            ),
            f"create the branch {remote.branch}",
        )


def commit(
    hub: Hub, remote: Remote, uploads: Sequence[Upload], *, message: str, as_pull_request: bool
) -> Committed:
    """Upload, then commit all at once on top of `remote.head`; nothing is visible before.

    Raises `MovedError` where the branch moved meanwhile, or the answer to the commit was lost:
    look again, then plan again. Raises `NetworkError` for the rest.
    """
    with _uploaded(hub, remote, uploads, as_pull_request) as operations:

        def send() -> Committed:
            info = hub.api.create_commit(
                remote.repo,
                operations,
                commit_message=message,
                revision=None if as_pull_request and remote.branch == "main" else remote.branch,
                create_pr=as_pull_request,
                parent_commit=remote.head or None,
            )
            return Committed(str(info.oid), str(info.commit_url), str(info.pr_url or ""))

        return _commit(hub, send, remote, as_pull_request=as_pull_request)


def _commit(
    hub: Hub, send: Callable[[], Committed], remote: Remote, *, as_pull_request: bool
) -> Committed:
    what = f"commit to {remote.repo}"
    for attempt in range(1, _TRIES + 1):
        try:
            return send()
        except ValueError as exc:  # the Hub refuses the card's front matter
            said = " ".join(str(exc).split())
            raise UsageError(f"the Hub refuses the card: {said}", fix="mend it there") from exc
        except _failures() as exc:
            response = _response(exc)
            if response is None and not as_pull_request:
                raise MovedError("the answer to the commit was lost") from exc
            if response is not None and response.status_code in (409, 412):
                raise MovedError("the branch has moved since it was looked at") from exc
            if attempt == _TRIES or response is None or not _is_passing(exc):
                raise network_error(exc, what, _AGAIN) from exc
            hub._wait(attempt, response, what)
    raise AssertionError("the last try returns or raises")


@contextmanager
def _uploaded(
    hub: Hub, remote: Remote, uploads: Sequence[Upload], as_pull_request: bool
) -> Iterator[list[CommitOperationAdd]]:
    """The files as operations whose content is at the Hub already.

    Over Xet where both sides have it; else, saying so, over LFS (the client takes that way for open
    files).
    """
    with ExitStack() as stack:
        for over_xet in (True, False):
            operations = [
                _operation(upload, None if over_xet else stack, remote.files.get(upload.path))
                for upload in uploads
            ]
            try:
                _send_files(hub, remote, operations, as_pull_request)
            except _failures() as exc:
                if not (over_xet and _is_xet_failure(exc)):
                    raise network_error(exc, f"upload to {remote.repo}", _AGAIN) from exc
                hub.tell("the Hub does not take files over Xet now; sending them over LFS")
            else:
                break
        yield operations


def _send_files(
    hub: Hub, remote: Remote, operations: list[CommitOperationAdd], as_pull_request: bool
) -> None:
    hub.api.preupload_lfs_files(
        remote.repo,
        operations,
        revision=remote.branch if remote.has_branch else None,
        create_pr=as_pull_request,
        free_memory=False,
    )


def _operation(
    upload: Upload, stack: ExitStack | None, there: RemoteFile | None
) -> CommitOperationAdd:
    """An addition; its sha256 is known and not computed again.

    stack  where a file is opened for sending it over LFS; None for the client's own choice
    """
    from huggingface_hub import CommitOperationAdd

    source = upload.source
    if isinstance(source, bytes):
        return CommitOperationAdd(upload.path, source if stack is None else BytesIO(source))
    operation = CommitOperationAdd(upload.path, str(source))
    operation.upload_info.sha256 = bytes.fromhex(upload.sha256)
    if stack is not None:
        operation.path_or_fileobj = stack.enter_context(source.open("rb"))
    return operation


def check_arrived(hub: Hub, repo: str, revision: str, uploads: Sequence[Upload]) -> None:
    """Raise `VerificationError` unless the revision holds exactly these files."""
    files = _files(hub, repo, [upload.path for upload in uploads], revision)
    for upload in uploads:
        there = files.get(upload.path)
        if there is None or not there.is_same(upload):
            raise VerificationError(
                "the file on the Hub is not the one that was sent" if there else "it is missing",
                where=f"{repo}/{upload.path}@{revision}",
                fix=_AGAIN,
            )


def set_tag(hub: Hub, repo: str, tag: str, revision: str) -> None:
    """Name a commit; a tag that names it already is fine, one that names another an error."""
    from huggingface_hub.errors import HfHubHTTPError

    def make() -> bool:
        try:
            hub.api.create_tag(repo, tag=tag, revision=revision)
        except HfHubHTTPError as exc:
            if exc.response.status_code != 409:
                raise
            return False
        return True

    if hub.call(make, f"tag {repo}"):
        return
    refs = hub.call(lambda: hub.api.list_repo_refs(repo), f"look at {repo}")
    if {ref.name: ref.target_commit for ref in refs.tags}.get(tag) != revision:
        raise tag_taken(repo, tag)


def tag_taken(repo: str, tag: str) -> UsageError:
    """A tag names another commit."""
    return UsageError(f"{repo} has a tag {tag!r} of another commit", fix="choose another tag")


# --- what goes wrong ---------------------------------------------------------------------------


def _failures() -> tuple[type[Exception], ...]:
    """What the client raises: its own errors, those of its HTTP library, Xet's, the LFS wrapper."""
    from huggingface_hub.errors import HfHubHTTPError

    http_error = HfHubHTTPError.__mro__[1]  # of whichever HTTP library the client uses
    return (HfHubHTTPError, http_error, OSError, RuntimeError)


def _chain(exc: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = exc
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _response(exc: BaseException) -> Any:
    """The Hub's answer behind an error; None where there was none."""
    from huggingface_hub.errors import HfHubHTTPError

    found = (one.response for one in _chain(exc) if isinstance(one, HfHubHTTPError))
    return next(found, None)


def _is_passing(exc: BaseException) -> bool:
    """Whether the same request may succeed later."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    response = _response(exc)
    if response is None:
        return not isinstance(exc, FileNotFoundError | PermissionError | OfflineModeIsEnabled)
    return response.status_code in (408, 429) or response.status_code >= 500


def _is_xet_failure(exc: BaseException) -> bool:
    """Xet's client raises Python's own errors, never the Hub's."""
    from huggingface_hub.utils._runtime import is_xet_available

    is_known = isinstance(exc, ConnectionError | TimeoutError | RuntimeError)
    return is_known and is_xet_available() and _response(exc) is None


def _retry_after(response: Any) -> float | None:
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return float(text) if text.isdigit() else None


_FIXES = {
    401: ("the Hub does not accept the token", _LOGIN),
    403: ("the token may not do that", "let it write there, or choose another --repo"),
    404: ("the Hub knows no such repository", "check --repo, and who is logged in"),
    429: ("too many requests", "wait a few minutes; " + _AGAIN),
}  # fmt: skip


def network_error(exc: BaseException, what: str, fix: str = "") -> NetworkError:
    """The Hub's answer, or its silence, in words; no address (they may be signed), no token."""
    response = _response(exc)
    if response is None:
        kind = type(list(_chain(exc))[-1]).__name__
        return NetworkError(
            f"cannot {what}: no answer from the Hub ({kind})",
            fix=fix or f"check the network; then {_AGAIN}",
        )
    said, own_fix = _FIXES.get(response.status_code, ("the Hub has trouble", ""))
    message = response.headers.get("X-Error-Message", "")
    details = f"{response.status_code}: {message}" if message else str(response.status_code)
    return NetworkError(f"cannot {what}: {said} ({details})", fix=own_fix or fix or _AGAIN)
