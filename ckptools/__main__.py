"""What `ckptools` and `python -m ckptools` start: the command line, and Ctrl-C while it loads."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit with its code; 130 for an interruption, as shells have it."""
    try:
        from ckptools.cli import main as command_line

        command_line()
    except KeyboardInterrupt:  # while modules are loaded: nothing has begun
        sys.stderr.write("interrupted; nothing was left behind\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
