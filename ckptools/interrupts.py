"""Ctrl-C and a polite kill, held back while a few lines must stay together.

A signal may come between any two steps of the main thread: between a file's opening and the line
that remembers to remove it. Must not know what is protected.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []),  # Windows has none
)
# What has got its final name: an interruption that comes later has it to tell.
finished: list[Path] = []
_Handler = Callable[[int, FrameType | None], object]


class _Held:
    """A handler that keeps signals for later while `holding`, and passes them on after that."""

    def __init__(self, before: _Handler) -> None:
        self.before = before
        self.holding = True
        self.caught: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.holding:
            self.caught.append(number)
        else:
            self.before(number, frame)


@contextmanager
def held_back() -> Iterator[None]:
    """Interruptions that come meanwhile are raised at the end, from here.

    Only the main thread is ever interrupted: in any other this does nothing. Signals that end the
    process without asking Python are as they were.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: dict[signal.Signals, _Held] = {}
    try:
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if callable(before):
                held[number] = _Held(before)
                signal.signal(number, held[number])
        yield
    finally:
        for handler in held.values():  # first: what comes from here on is passed on at once
            handler.holding = False
        for number, handler in held.items():
            signal.signal(number, handler.before)
        for handler in held.values():
            for caught in handler.caught:
                handler.before(caught, None)
