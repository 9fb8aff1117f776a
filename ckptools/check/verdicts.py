"""What a check says: a figure, the bound it is held against, a verdict, and the reason in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "warn", "fail"]

_ORDER: tuple[Verdict, ...] = ("pass", "warn", "fail")


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    id       a word or two with a dot between: "weights.finite", "barrier"
    value    the figure; None where there is none
    bound    what the figure was held against: that of the verdict, else the one that warns
    reason   in words: what is wrong, with names of tensors; or what was found
    tensors  names that the verdict is about, all of them
    """

    id: str
    value: float | None
    bound: float | None
    verdict: Verdict
    reason: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All checks of one model.

    notes  what could not be asked, and what was seen on the way
    """

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst of the checks; "pass" where there is none."""
        return max((check.verdict for check in self.checks), key=_ORDER.index, default="pass")

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.verdict == "fail")


def held(
    id: str,
    value: float,
    *,
    warn: float,
    fail: float,
    reason: str,
    least: bool = False,
    tensors: Sequence[str] = (),
) -> Check:
    """A check of a figure against two bounds, which it must not pass; NaN fails.

    least  the bounds are the least that the figure may be, not the most
    """
    sign = -1 if least else 1
    if not sign * value <= sign * fail:
        return Check(id, value, fail, "fail", reason, tuple(tensors))
    verdict: Verdict = "pass" if sign * value <= sign * warn else "warn"
    return Check(id, value, warn, verdict, reason, tuple(tensors))
