"""What `ckptools` and `python -m ckptools` start: the command line, and Ctrl-C while it loads."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

_INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command line and exit with its code; 130 for an interruption, as shells have it."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        from ckptools.cli import main as command_line

        command_line()
    except KeyboardInterrupt:  # while modules are loaded: nothing has begun
        with suppress(KeyboardInterrupt):
            sys.stderr.write("interrupted; nothing was left behind\n")
    except SystemExit as exc:
        if exc.code != _INTERRUPTED:
            raise
    # Python remembers an interruption that went through an `exec`, as of a dataclass, and would
    # end `python -m` by the signal, whatever the exit code is.
    with suppress(OSError, ValueError, KeyboardInterrupt):
        sys.stdout.flush()
    os._exit(_INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A polite kill, as Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
