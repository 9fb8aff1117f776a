"""What a merge, or whatever else takes long, is told to tell. Must not know how it is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptools.plan import Plan


class Progress:
    """What a merge tells while it runs; this one says nothing."""

    def start(self, stage: str, total_bytes: int) -> None:
        """A stage begins: "checking pins" or "merging"."""

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""

    def planned(self, plan: Plan) -> None:
        """The plan stands."""
