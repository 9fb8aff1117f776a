"""The exception tree: one class per way a user can be stopped, each with its exit code.

Every error says what is wrong (with both values), where (file:line or tensor), and what to do next.
Knows nothing of terminals: `report` shows errors, `cli` turns them into exit codes.

    CkptError                 base; exit 2
    ├── UsageError            a command was given what it cannot use
    ├── RecipeError           the recipe cannot mean anything: typo, type, formula
    ├── InputError            a source cannot be read or does not fit
    │   └── InvalidFileError  a file breaks the safetensors format
    ├── OutputError           the result cannot be written: exists, disk full, equal to an input
    ├── NonFiniteError        NaN or Inf in an input or a result; exit 1
    ├── VerificationError     the written file differs from the plan; exit 1
    ├── UnsafeError           refused as unsafe; exit 3
    ├── NetworkError          network or authorisation; exit 4
    └── ManyErrors            several of the above, shown together
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import ClassVar


class CkptError(Exception):
    """A fact the user can act on.

    what   the fact, lower case, no full stop, values quoted with !r
    where  file:line:column, tensor name or file; "" when there is no place
    fix    the next thing to do; "" when the fact says it
    """

    code: ClassVar[str] = "error"
    exit_code: int = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\nfix: {self.fix}" if self.fix else text

    def at(self, where: str) -> CkptError:
        """The same error, placed at `where` unless it already has a place."""
        if not self.where:
            self.where = where
        return self


class UsageError(CkptError):
    """A command was given what it cannot use."""

    code = "usage"


class RecipeError(CkptError):
    """The recipe cannot mean anything: a typo, a wrong type, a formula that does not parse."""

    code = "recipe"


class InputError(CkptError):
    """A source cannot be read, or the sources do not fit each other."""

    code = "input"


class InvalidFileError(InputError):
    """A file breaks the safetensors format, or is something else altogether."""

    code = "invalid-file"


class OutputError(CkptError):
    """The result cannot be written: it exists, the disk is full, it is one of the inputs."""

    code = "output"


class Interrupted(KeyboardInterrupt):  # an interruption is no error
    """Ctrl-C where something was done: says what is kept."""


class NonFiniteError(CkptError):
    """NaN or Inf in an input or in a result, fp16 overflow included."""

    code = "non-finite"
    exit_code = 1


class NonFiniteSourceError(NonFiniteError):
    """NaN or Inf that an input holds already."""


class VerificationError(CkptError):
    """The file that was written differs from the plan."""

    code = "verification"
    exit_code = 1


class UnsafeError(CkptError):
    """Refused as unsafe: a path that leaves its folder, a pickle outside the allow-list."""

    code = "unsafe"
    exit_code = 3


class NetworkError(CkptError):
    """The network or an authorisation failed."""

    code = "network"
    exit_code = 4


class ManyErrors(CkptError):  # noqa: N818  # it is several
    """Several errors found in one go; the exit code is that of the gravest."""

    code = "many"

    def __init__(self, errors: Sequence[CkptError]) -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = tuple(errors)
        self.exit_code = max(error.exit_code for error in errors)

    def __str__(self) -> str:
        return self.what


def raise_all(errors: Sequence[CkptError]) -> None:
    """Raise nothing, the one error, or `ManyErrors`."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ManyErrors(errors)


def grouped(errors: Sequence[CkptError], most: int = 8) -> list[CkptError]:
    """Per-tensor errors, the first few kept: one wrong model makes hundreds alike."""
    if len(errors) <= most:
        return list(errors)
    rest = len(errors) - most
    more = InputError(f"and {counted(rest, 'more tensor')} with the same kind of error")
    return [*errors[:most], more]


def counted(number: int, noun: str, verb: str = "") -> str:
    """A number with its noun, and verb, in agreement.

    >>> counted(1, "tensor", "is"), counted(1200, "tensor", "is")
    ('1 tensor is', '1,200 tensors are')
    """
    if number == 1:
        return f"1 {noun} {verb}".rstrip()
    plural = {"is": "are", "has": "have", "does": "do"}.get(verb, verb.removesuffix("s"))
    return f"{number:,} {noun}s {plural}".rstrip()


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word nearest to `word`, or lists the known words.

    >>> nearest("modles", ["models", "merge"])
    "did you mean 'models'?"
    """
    words = sorted(known)
    close = closest(word, words)
    if close:
        return f"did you mean {close!r}?"
    return f"known: {', '.join(words)}" if words else ""


def closest(word: str, known: Iterable[str]) -> str:
    """The known word that `word` may be a slip of; "" where none is near."""
    words = sorted(known)
    other_case = [each for each in words if each.casefold() == word.casefold()]
    return next(iter(other_case or difflib.get_close_matches(word, words, n=1)), "")


def nearest_name(name: str, known: Sequence[str], otherwise: str) -> str:
    """As `nearest`, for names too many to list; `otherwise` where none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else otherwise
