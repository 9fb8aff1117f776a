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
from typing import TYPE_CHECKING, NoReturn, TextIO

import click

from ckptools.errors import CkptError, Interrupted, nearest
from ckptools.interrupts import finished

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

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
_NEAR = 40  # letters beside one that cannot be written, to tell where it stands
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


# Windows says EINVAL.
_READER_LEFT = (errno.EPIPE, errno.EINVAL) if os.name == "nt" else (errno.EPIPE,)
_OS_FIXES = {
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EACCES: "check its rights, or write elsewhere",
    errno.EROFS: "write elsewhere: this disk may only be read",
}


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    gc.set_threshold(*_COLLECT_RARELY)
    _open_streams()
    for number in _TERMINATING:
        signal.signal(number, _on_terminate)
    sys.unraisablehook = _interrupt_again
    code = run(sys.argv[1:])
    for number in (signal.SIGINT, *_TERMINATING):
        signal.signal(number, signal.SIG_IGN)  # it is done; its exit code should say so
    gc.freeze()  # the end of the process frees torch's objects faster than the collector
    sys.exit(code)


def _open_streams() -> None:
    """Streams that no reader who leaves, and no shell that has closed them (`>&-`), can fail.

    A model that is opened would get the number of a closed one, and be written to.
    """
    for number in range(3):
        if not _is_open(number):
            null = os.open(os.devnull, os.O_RDWR)  # mostly the lowest number that is free: this one
            if null != number:
                os.dup2(null, number)
                os.close(null)
    sys.stdout = _stream(sys.stdout, 1, "replace")  # a table in a locale that has no such letters
    sys.stderr = _stream(sys.stderr, 2, "backslashreplace")


def _is_open(number: int) -> bool:
    """Whether a standard stream is there: 1 and 2 to be written to, not a script that sh reads."""
    try:
        os.fstat(number)
        import fcntl

        access = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    except ImportError:  # Windows
        return True
    except OSError:
        return False
    return number == 0 or access != os.O_RDONLY


def _stream(given: TextIO | None, number: int, errors: str) -> TextIO:
    if isinstance(given, io.TextIOWrapper) and given.isatty():
        given.reconfigure(errors=errors)
        return given
    encoding = given.encoding if given is not None else None
    raw = io.BufferedWriter(_Heedless(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding, errors, line_buffering=number == 2)


class _Heedless(io.FileIO):
    """A pipe whose reader may leave, as `head` does: the rest is dropped, and the work goes on."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as exc:
            if exc.errno not in _READER_LEFT:
                raise
            return len(memoryview(data))


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code."""
    words = [word for word in arguments if not word.startswith("-")]
    command = "-".join(words[: 2 if words[:1] == ["lora"] else 1])
    as_json = bool(command) and "--json" in arguments
    finished.clear()
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
    except OSError as exc:  # a disk that fails, a name that is too long
        fix = _OS_FIXES.get(exc.errno or 0, "")
        where = exc.filename or ("standard output" if exc.errno == errno.ENOSPC else "")
        error = CkptError(exc.strerror or str(exc), where=str(where), fix=fix)
        return _show(error, command, as_json=as_json)
    except UnicodeEncodeError as exc:  # a path in letters that this locale has not
        near = exc.object[max(0, exc.start - _NEAR) : exc.end + _NEAR]
        what = f"{near!r} cannot be written in this system's encoding, {exc.encoding}"
        is_utf8 = exc.encoding.lower().replace("-", "") == "utf8"
        fix = "give the file another name" if is_utf8 else "use UTF-8: PYTHONUTF8=1"
        return _show(CkptError(what, fix=fix), command, as_json=as_json)
    return result if isinstance(result, int) else 0


def _cancelled(exc: BaseException) -> int:
    said = next((each for each in (exc, exc.__cause__) if isinstance(each, Interrupted)), None)
    there = [path for path in finished if path.exists()]  # not in a folder that was removed
    kept = f"{there[0]} is written" if there else "nothing was left behind"
    click.echo(str(said or f"interrupted; {kept}"), err=True)
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
