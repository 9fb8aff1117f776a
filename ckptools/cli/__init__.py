"""The command line: parse, call, show. One file per command, no logic.

Exit codes: 0 done · 1 a check failed · 2 wrong usage, recipe or I/O · 3 refused as unsafe ·
4 network. A user's mistake never shows a traceback; a bug always does.
"""

from __future__ import annotations

import _thread
import errno
import gc
import importlib
import io
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

import click

from ckptools.errors import CkptError, Interrupted, nearest

_COMMANDS = (
    "merge", "plan", "explain", "inspect", "diff", "kinship", "verify", "render", "check", "hash",
    "convert", "lora", "lock", "reproduce", "sweep", "publish", "card", "methods", "families",
    "demo", "schema",
)  # fmt: skip
# A closed terminal (SIGHUP, which Windows lacks) is an interruption like any other.
_TERMINATING = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
# Importing torch makes hundreds of thousands of objects that live on; looking through them again
# and again takes a third of its time. Measured: 1.8 s from start to end, 1.05 s like this.
_COLLECT_RARELY = (100_000, 50, 50)
_CANCELLED = 130  # as shells report an end by Ctrl-C
_SOON_S = 0.01  # until Python is done with the callback that lost an interruption


class _Lazy(click.Group):
    """A group that imports a command's module only when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"ckptools.cli.{cmd_name}")
        command = module.command
        if not isinstance(command, click.Command):
            raise TypeError(f"{cmd_name} is not a command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, naming the nearest command where there is none of that name."""
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}: {nearest(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from ckptools.manifest import version

        click.echo(f"ckptools {version()}")
        ctx.exit()


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version,
    help="Show the version.",
)  # fmt: skip
def group() -> None:
    """Merge model checkpoints by recipe, tensor by tensor.

    \b
    Examples:
      ckptools demo
      ckptools plan recipe.yaml
      ckptools merge recipe.yaml --set M=0.5
    """


_OS_FIXES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EACCES: "check its rights, or write elsewhere",
    errno.EROFS: "write elsewhere: this disk may only be read",
}


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    gc.set_threshold(*_COLLECT_RARELY)
    _open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a table in a locale that has no such letters
    for number in _TERMINATING:
        signal.signal(number, _on_terminate)
    sys.unraisablehook = _interrupt_again
    code = run(sys.argv[1:])
    for number in (signal.SIGINT, *_TERMINATING):
        signal.signal(number, signal.SIG_IGN)  # it is done; its exit code should say so
    gc.freeze()  # the end of the process frees torch's objects faster than the collector
    sys.exit(code)


def _open_streams() -> None:
    """Where a shell has closed stdin, stdout or stderr (`>&-`), give them the null device.

    A model that is opened would get the number of the closed one, and be written to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(2, "w", closefd=False))


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code."""
    words = [word for word in arguments if not word.startswith("-")]
    command = "-".join(words[: 2 if words[:1] == ["lora"] else 1])
    as_json = bool(command) and "--json" in arguments
    try:
        result = group.main(args=arguments, prog_name="ckptools", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt) as exc:
        return _cancelled(exc)
    except RuntimeError as exc:  # Python 3.11 wraps what is raised while a class is made
        if not isinstance(exc.__cause__, KeyboardInterrupt):
            raise
        return _cancelled(exc)
    except click.ClickException as exc:
        return _usage_error(exc, command, as_json=as_json)
    except CkptError as exc:
        return _show(exc, command, as_json=as_json)
    except (BrokenPipeError, SystemExit):  # `ckptools … | head`; click exits where it meets one
        sys.stdout = io.StringIO()  # nothing is left to flush to
        return 0
    except OSError as exc:  # a disk that fails, a name that is too long
        fix = _OS_FIXES.get(exc.errno or 0, "")
        where = exc.filename or ("standard output" if exc.errno == errno.ENOSPC else "")
        error = CkptError(exc.strerror or str(exc), where=str(where), fix=fix)
        return _show(error, command, as_json=as_json)
    except UnicodeEncodeError as exc:  # a path in letters that this locale has not
        what = f"{exc.object!r} cannot be written in this system's encoding, {exc.encoding}"
        return _show(CkptError(what, fix="use UTF-8: PYTHONUTF8=1"), command, as_json=as_json)
    return result if isinstance(result, int) else 0


def _cancelled(exc: BaseException) -> int:
    said = next((each for each in (exc, exc.__cause__) if isinstance(each, Interrupted)), None)
    click.echo(str(said or "interrupted; nothing was left behind"), err=True)
    return _CANCELLED


def _show(error: CkptError, command: str, *, as_json: bool) -> int:
    from ckptools import report

    is_told = False
    try:
        if as_json:
            report.show_json(command, {"error": report.error_json(error)})
        sys.stdout.flush()
        is_told = as_json
    except OSError:  # a full disk: stdout may be what failed
        sys.stdout = io.StringIO()  # nothing is left to flush to
    if not is_told:
        report.show_error(error)
    return error.exit_code


def _usage_error(error: click.ClickException, command: str, *, as_json: bool) -> int:
    if as_json:
        from ckptools import report

        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        fix = f"see {path} --help" if path else ""
        body = {"code": "usage", "message": error.format_message(), "where": "", "fix": fix}
        report.show_json(command, {"error": body})
    else:
        error.show()
    return 2


def _on_terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _interrupt_again(lost: sys.UnraisableHookArgs) -> None:
    """Where Python drops an interruption, as in a weak reference's callback, send it once more."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        threading.Timer(_SOON_S, _interrupt, (threading.get_ident(),)).start()
    else:
        sys.__unraisablehook__(lost)


def _interrupt(thread: int) -> None:
    if hasattr(signal, "pthread_kill"):  # which ends a wait, too
        signal.pthread_kill(thread, signal.SIGTERM)
    else:
        _thread.interrupt_main(signal.SIGTERM)
