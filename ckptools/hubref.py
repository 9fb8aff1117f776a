"""How models on the Hugging Face Hub are written: `hf://owner/repo[/file][@revision]`.

Names alone: nothing here asks the Hub, or knows what is in a repository.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ckptools.errors import UsageError

SCHEME = "hf://"
_FOLDER = "hf:"  # what pathlib makes of the scheme: Path("hf://a/b") is hf:/a/b
_SHOWN_COMMIT = 12
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED_REPO = re.compile(r"models--(.+?)--(.+)")
_OTHER_KINDS = ("datasets", "spaces", "buckets")
_FIX = "write hf://owner/repo, hf://owner/repo/file.safetensors or either with @revision"


@dataclass(frozen=True)
class HubRef:
    """A model on the Hub.

    repo      owner/name
    file      path within the repository; "" where the repository is to say
    revision  branch, tag or commit; "" is the main branch
    """

    repo: str
    file: str = ""
    revision: str = ""

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{file}{revision}"

    @property
    def path(self) -> Path:
        """The reference as it travels where paths do; `hub_ref_of` reads it back."""
        return Path(str(self))

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which can never mean another file."""
        return is_commit(self.revision)

    @property
    def title(self) -> str:
        """The reference for messages, with a commit cut short."""
        short = self.revision[:_SHOWN_COMMIT] if self.is_pinned else self.revision
        return str(replace(self, revision=short))


def is_commit(revision: str) -> bool:
    """Whether a revision is the full name of a commit."""
    return bool(_COMMIT.fullmatch(revision))


def is_hub_text(text: str) -> bool:
    """Whether a text is meant as a model on the Hub."""
    return text.startswith(SCHEME)


def is_address(text: str) -> bool:
    """Whether a text names a place beyond this machine, as hf:// and s3:// do."""
    return re.match(r"[A-Za-z][\w+.-]+:/", text) is not None


ADDRESS_FIX = "write a file here; `ckptools publish` puts it on the Hub"  # of an output


def parse_hub_ref(text: str, revision: str = "") -> HubRef:
    """Read `hf://owner/repo[/file][@revision]`; `hf://owner/repo@revision/file` is understood, too.

    revision  as given beside the text, where it may stand instead
    Raises `UsageError`. Names that leave the repository are refused.
    """
    rest = text.removeprefix(SCHEME)
    owner, _, rest = rest.partition("/")
    name, slash, file = rest.partition("/")
    own = ""
    if "@" in name:
        name, _, own = name.partition("@")
        if own == "refs" and slash:  # hf://owner/repo@refs/pr/1
            parts = file.split("/")
            own, file = "/".join(["refs", *parts[:2]]), "/".join(parts[2:])
            slash = "/" if file else ""
    elif "@" in file:
        file, _, own = file.rpartition("@")
        slash = "/" if file else ""
    if owner in _OTHER_KINDS:
        raise UsageError(f"{text!r} is no model: {owner} are not read", fix=_FIX)
    if not _NAME.fullmatch(owner) or not _NAME.fullmatch(name) or ".." in owner + name:
        raise UsageError(f"{text!r} does not name a repository", fix=_FIX)
    if slash and not is_safe_file(file):
        raise UsageError(f"{text!r} does not name a file of the repository", fix=_FIX)
    if own and revision and own != revision:
        raise UsageError(
            f"two revisions, {own!r} in the path and {revision!r}", fix="give one of them"
        )
    own = own or revision
    if ("@" in rest and not own) or (own and not is_revision(own)):
        raise UsageError(f"{own!r} is no revision", fix="give a branch, a tag or a commit")
    return HubRef(f"{owner}/{name}", file, own)


def is_revision(text: str) -> bool:
    """Whether a text can be a branch, a tag or a commit."""
    return bool(_REVISION.fullmatch(text)) and ".." not in text and "//" not in text


def is_safe_file(file: str) -> bool:
    """Whether a file's path stays within its repository and on one line."""
    return (
        file.isprintable()
        and not any(char in file for char in '\\:*?"<>|')
        and all(part not in ("", ".", "..") for part in file.split("/"))
    )


def hub_ref_of(path: Path) -> HubRef | None:
    """The reference that a path stands for, or None for a path of this machine.

    Raises `UsageError` as `parse_hub_ref` does.
    """
    if is_local(path):
        return None
    return parse_hub_ref(SCHEME + "/".join(path.parts[1:]))


def is_local(path: Path) -> bool:
    """Whether a path is one of this machine."""
    return path.parts[:1] != (_FOLDER,)


def cached_ref(path: Path) -> HubRef | None:
    """What a path in the Hub's cache is on the Hub; None for any other path.

    Source of the layout: huggingface_hub, docs "Understand caching".

    >>> str(cached_ref(Path("/hub/models--o--r/snapshots") / ("0" * 40) / "a/b.bin"))[:16]
    'hf://o/r/a/b.bin'
    """
    for at in range(len(path.parts) - 3, -1, -1):
        repo = _CACHED_REPO.fullmatch(path.parts[at])
        folder, commit, *file = path.parts[at + 1 :]
        if repo and folder == "snapshots" and is_commit(commit):
            return HubRef(f"{repo[1]}/{repo[2]}", "/".join(file), commit)
    return None


def shown(path: Path) -> str:
    """A path as its user wrote it; of what is, or was fetched from, the Hub the reference."""
    if is_local(path):
        return str(cached_ref(path) or path)
    return SCHEME + "/".join(path.parts[1:])


def short_name(path: Path) -> str:
    """What to call a model: its file's name without the ending, or its repository's."""
    ref = cached_ref(path)
    return ref.repo.partition("/")[2] if ref and not ref.file else path.stem
