"""Merges that are killed, interrupted, starved and cheated: what must be left is left.

Whatever happens, the output's name holds the old bytes or the whole new file, never a part.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Self

import pytest
import torch
from models import UNET, model_values, shrunk, write_model

from ckptools import writer
from ckptools.checkpoint import read_header
from ckptools.errors import CkptError, InputError, NonFiniteError, OutputError
from ckptools.progress import Progress
from ckptools.recipe import load_recipe
from ckptools.workflow import merge
from ckptools.writer import manifest_path

OLD = b"the model of yesterday, dear to somebody"
COMMAND = [sys.executable, "-m", "ckptools", "merge", "--force"]
NAN_TENSOR = f"{UNET}middle_block.1.proj_in.weight"
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks a process with torch in it")


@dataclass(frozen=True)
class Job:
    """A recipe over two files, the output it writes (over an older file), and its true bytes."""

    recipe: Path
    output: Path
    sha256: str

    @property
    def part(self) -> Path:
        return self.output.with_name(self.output.name + ".part")

    def start_over(self) -> None:
        """The older file is there, its manifest is not; parts stay."""
        self.output.write_bytes(OLD)
        manifest_path(self.output).unlink(missing_ok=True)

    def part_stamp(self) -> tuple[int, int]:
        """Changes when a process begins to write the part."""
        try:
            info = self.part.stat()
        except FileNotFoundError:
            return (0, 0)
        return (info.st_ino, info.st_mtime_ns)

    def is_new(self) -> bool:
        """Whether the output is the new file; it must be that or the old one, to the byte."""
        data = self.output.read_bytes()
        if data == OLD:
            return False
        assert hashlib.sha256(data).hexdigest() == self.sha256
        return True

    def assert_untouched(self, *others: str) -> None:
        """The old file, and nothing but it and `others`, is in the output's folder."""
        assert not self.is_new()
        found = {path.name for path in self.output.parent.iterdir()}
        assert found == {self.output.name, *others}


def write_job(folder: Path, models: Path, output: Path) -> Job:
    """A recipe in `folder` over A and B of `models`."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "ckptools: 1\n"
        f"models:\n  A: {json.dumps(str(models / 'A.safetensors'))}\n"
        f"  B: {json.dumps(str(models / 'B.safetensors'))}\n"
        "params: {M: 0.3}\nmerge: A * (1 - M) + B * M\n"
        f"output: {{path: {json.dumps(str(output))}, dtype: fp32}}\n"
    )
    return Job(recipe, output, "")


def run(
    job: Job, *options: str, command: Sequence[str] = COMMAND
) -> subprocess.CompletedProcess[str]:
    words = [*command, *options, str(job.recipe)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A and B, 34 MB each in F16: the merge in F32 writes 67 MB in 64 pieces."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("AB"):
        write_model(folder / f"{name}.safetensors", shrunk("sd1", 8), seed=seed)
    return folder


@pytest.fixture(scope="module")
def job(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job in a folder of its own, its result known from a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "out").mkdir()
    quiet = write_job(folder, models, folder / "out" / "m.safetensors")
    assert run(quiet).returncode == 0
    assert read_header(quiet.output).file_bytes > 60_000_000
    return Job(quiet.recipe, quiet.output, hashlib.sha256(quiet.output.read_bytes()).hexdigest())


# --- processes to end ----------------------------------------------------------------------------

LAUNCHER = """
import os, sys
import ckptools.engine, ckptools.report, ckptools.verify, ckptools.workflow, safetensors
from ckptools import cli
children = {}
for line in sys.stdin:
    word, *rest = line.rstrip("\\n").split("\\t")
    if word == "start":
        child = os.fork()
        if child == 0:
            log = os.open(rest[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["ckptools", *rest[1:]]
            code = 99
            try:
                cli.main()
            except SystemExit as exc:
                code = exc.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
    else:
        print(os.waitstatus_to_exitcode(os.waitpid(int(word), 0)[1]), flush=True)
"""


class Launcher:
    """Starts `ckptools` in new processes that need not import torch first: forks of one that did.

    A child stays a zombie until `wait`, so its number cannot be another process's.
    """

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def start(self, job: Job, log: Path) -> int:
        return self._ask("start", str(log), "merge", "--force", "--threads", "2", str(job.recipe))

    def wait(self, child: int) -> int:
        return self._ask(str(child))

    def _ask(self, *words: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join(words) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as started:
        yield started


def let_pass(seconds: float) -> None:
    threading.Event().wait(seconds)


def wait_for_part(job: Job, before: tuple[int, int]) -> None:
    """Until somebody begins to write the part, or the output is there."""
    limit = perf_counter() + 60
    while job.part_stamp() == before and job.output.stat().st_size == len(OLD):
        assert perf_counter() < limit, "no part appeared"
        let_pass(0.001)


@pytest.fixture(scope="module")
def window(job: Job, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds from the first byte of the part to the end of a merge, on this machine, now."""
    job.start_over()
    job.part.unlink(missing_ok=True)
    child = launcher.start(job, tmp_path_factory.mktemp("log") / "log")
    wait_for_part(job, (0, 0))
    begin = perf_counter()
    assert launcher.wait(child) == 0
    assert job.is_new()
    return perf_counter() - begin


@needs_fork
@pytest.mark.slow
def test_thirty_killed_merges_leave_the_old_file_or_the_whole_new_one(
    job: Job, launcher: Launcher, window: float, tmp_path: Path
) -> None:
    """Each goes on from what the one before it left; the last is left alone."""
    moments = random.Random(20)
    parts_left = 0
    for _ in range(30):
        job.start_over()
        before = job.part_stamp()
        child = launcher.start(job, tmp_path / "log")
        wait_for_part(job, before)
        let_pass(moments.uniform(0, 1.05) * window)
        os.kill(child, signal.SIGKILL)
        code = launcher.wait(child)

        assert code in (-signal.SIGKILL, 0), (tmp_path / "log").read_text()
        assert job.is_new() or code == -signal.SIGKILL
        parts_left += job.part.exists()

    assert parts_left >= 5  # more, unless the machine became faster after the window was measured
    job.start_over()
    assert launcher.wait(launcher.start(job, tmp_path / "log")) == 0
    assert job.is_new()
    assert sorted(path.name for path in job.output.parent.iterdir()) == [
        "m.safetensors", "m.safetensors.ckptools.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_command_leaves_the_old_file_and_the_next_one_works(job: Job) -> None:
    """As above, through `python -m ckptools`; before the part is there, too."""
    for seconds in (0.3, None):
        job.start_over()
        before = job.part_stamp()
        with subprocess.Popen(
            [*COMMAND, str(job.recipe)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            if seconds is None:
                wait_for_part(job, before)
            else:
                let_pass(seconds)
            process.kill()
        assert process.returncode in (-signal.SIGKILL, 0)
        assert job.is_new() == (process.returncode == 0)

    job.start_over()
    done = run(job)

    assert (done.returncode, job.is_new()) == (0, True), done.stderr
    assert not job.part.exists()


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_merge_leaves_nothing_behind(
    job: Job, launcher: Launcher, window: float, tmp_path: Path, number: signal.Signals
) -> None:
    moments = random.Random(int(number))
    codes = []
    job.part.unlink(missing_ok=True)
    for _ in range(8):
        job.start_over()
        child = launcher.start(job, tmp_path / "log")
        wait_for_part(job, (0, 0))
        let_pass(moments.uniform(0, 0.8) * window)
        os.kill(child, number)
        codes.append(launcher.wait(child))

        log = (tmp_path / "log").read_text()
        assert "Traceback" not in log
        assert not job.part.exists()
        if codes[-1] == 130 and not job.is_new():
            assert "interrupted; nothing was left behind" in log
            job.assert_untouched()

    assert set(codes) <= {0, 130}
    assert codes.count(130) >= 2


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_an_interrupted_command_says_so_and_exits_130(job: Job) -> None:
    for _ in range(5):  # a moment too late is no failure: try again
        job.start_over()
        job.part.unlink(missing_ok=True)
        with subprocess.Popen(
            [*COMMAND, str(job.recipe)], stderr=subprocess.PIPE, text=True
        ) as process:
            wait_for_part(job, (0, 0))
            process.terminate()
            _, log = process.communicate(timeout=60)
        if process.returncode:
            break

    assert process.returncode == 130
    assert "interrupted; nothing was left behind" in log
    assert "Traceback" not in log
    job.assert_untouched()


@needs_fork
def test_of_two_merges_into_one_file_one_waits_its_turn(
    job: Job, launcher: Launcher, tmp_path: Path
) -> None:
    """For a moment; `test_a_merge_into_a_file_that_is_being_written_is_refused` for longer."""
    for _ in range(4):
        job.start_over()
        logs = [tmp_path / "one", tmp_path / "two"]
        children = [launcher.start(job, log) for log in logs]
        codes = [launcher.wait(child) for child in children]

        assert 0 in codes
        assert job.is_new()
        assert not job.part.exists()
        for code, log in zip(codes, logs, strict=True):
            if code:
                assert code == 2
                assert "another process is writing this output" in log.read_text()


@needs_fork
def test_a_merge_into_a_file_that_is_being_written_is_refused(
    job: Job, launcher: Launcher, tmp_path: Path
) -> None:
    job.start_over()
    job.part.unlink(missing_ok=True)
    first = launcher.start(job, tmp_path / "one")
    wait_for_part(job, (0, 0))
    while job.part.exists() and not job.part.stat().st_size:  # not locked yet
        let_pass(0.001)
    os.kill(first, signal.SIGSTOP)  # its workers wait for it; the lock is theirs, too
    if not job.part.exists():
        pytest.fail("the first merge was done before it could be stopped")
    code = launcher.wait(launcher.start(job, tmp_path / "two"))
    os.kill(first, signal.SIGCONT)

    assert code == 2
    assert "another process is writing this output" in (tmp_path / "two").read_text()
    assert launcher.wait(first) == 0
    assert job.is_new()
    assert not job.part.exists()


# --- disks and folders ---------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with options such as "size=10m", where that is permitted."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "ckptools-test", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as exc:
            pytest.skip(f"mounting is not permitted here: {getattr(exc, 'stderr', '') or exc}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


class AtStart(Progress):
    """Does something just before the first tensor is read."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def start(self, stage: str, total_bytes: int) -> None:
        if stage == "merging":
            self.action()


class WhenPlanned(Progress):
    """Does something between the plan and the first byte of the output."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def planned(self, plan: object) -> None:
        self.action()


def test_a_disk_that_fills_up_after_the_plan_leaves_the_old_file(
    models: Path, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=90m")
    job = write_job(tmp_path, models, disk / "m.safetensors")
    job.start_over()
    recipe = load_recipe(job.recipe)

    def fill() -> None:
        (disk / "filler").write_bytes(bytes(40_000_000))

    with pytest.raises(OutputError, match="the disk is full; nothing was left behind") as caught:
        merge(recipe, force=True, progress=WhenPlanned(fill))

    assert caught.value.where == str(job.output)
    job.assert_untouched("filler")


@pytest.mark.skipif(sys.platform != "linux", reason="room is taken beforehand on Linux")
def test_nobody_can_take_the_room_of_a_merge_that_has_begun(
    models: Path, tmp_path: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk, that is; what is mounted here is memory, and taken for a disk."""
    monkeypatch.setattr(writer, "_TMPFS", 0)
    disk = mounted("size=90m")
    job = write_job(tmp_path, models, disk / "m.safetensors")
    refused: list[int | None] = []

    def fill() -> None:
        try:
            (disk / "filler").write_bytes(bytes(40_000_000))
        except OSError as exc:
            refused.append(exc.errno)
            (disk / "filler").unlink()

    merge(load_recipe(job.recipe), progress=AtStart(fill))

    assert refused == [errno.ENOSPC]
    assert job.output.stat().st_size > 60_000_000


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    models: Path, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    job = write_job(tmp_path, models, mounted("size=20m") / "m.safetensors")
    job.start_over()

    done = run(job)

    assert done.returncode == 2
    assert "the disk is too full: the output needs 67.1 MB, 21.0 MB are free" in done.stderr
    job.assert_untouched()


LIMITED = """
import resource
from ckptools.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000_000, 30_000_000))
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="no limits of this kind")
def test_a_limit_on_file_sizes_leaves_the_old_file(models: Path, tmp_path: Path) -> None:
    """Needs no rights: every write beyond 30 MB fails, as on a disk that holds no larger file."""
    (tmp_path / "out").mkdir()
    job = write_job(tmp_path, models, tmp_path / "out" / "m.safetensors")
    job.start_over()

    done = run(job, command=[sys.executable, "-c", LIMITED, "merge", "--force"])

    assert done.returncode == 2, done.stderr
    assert "the file would be larger than a file may be here" in done.stderr
    assert "shard_size" in done.stderr
    assert "Traceback" not in done.stderr
    job.assert_untouched()


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="no os.pwrite")
def test_a_write_that_fails_in_the_middle_leaves_the_old_file(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as the full disk above, where mounting is not permitted."""
    (tmp_path / "out").mkdir()
    job = write_job(tmp_path, models, tmp_path / "out" / "m.safetensors")
    job.start_over()
    whole = os.pwrite

    def limited(number: int, view: memoryview, at: int) -> int:
        if at > 20_000_000:
            raise OSError(28, "No space left on device")
        return whole(number, view, at)

    monkeypatch.setattr(os, "pwrite", limited)

    with pytest.raises(OutputError, match="the disk is full; nothing was left behind"):
        merge(load_recipe(job.recipe), force=True)

    job.assert_untouched()


def test_a_read_only_folder_is_refused_in_words(
    models: Path, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    if os.name == "nt":
        pytest.skip("rights of folders work differently on Windows")
    if os.geteuid() == 0:  # whom rights do not stop, but a read-only disk does
        folder = mounted("size=1m,ro")
    else:
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o555)
    job = write_job(tmp_path, models, folder / "m.safetensors")

    done = run(job)

    assert done.returncode == 2
    assert f"the folder {str(folder)!r} cannot be written to" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []


# --- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "value"), [("A", torch.nan), ("B", -torch.inf)])
def test_nan_and_inf_in_an_input_are_named_and_counted(
    models: Path, tmp_path: Path, model: str, value: float
) -> None:
    sick = model_values(shrunk("sd1", 8), seed=7)[NAN_TENSOR]
    sick.view(-1)[[3, 1000, 5000]] = value
    folder = tmp_path / "models"
    folder.mkdir()
    for seed, name in enumerate("AB"):
        if name == model:
            edits = {NAN_TENSOR: sick}
            write_model(folder / f"{name}.safetensors", shrunk("sd1", 8), seed=seed, edits=edits)
        else:
            (folder / f"{name}.safetensors").symlink_to(models / f"{name}.safetensors")
    (tmp_path / "out").mkdir()
    job = write_job(tmp_path, folder, tmp_path / "out" / "m.safetensors")
    job.start_over()

    done = run(job, "--json")

    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["where"] == NAN_TENSOR
    assert error["message"] == f"{model} has 3 NaN or Inf of {sick.numel():,} values"
    assert error["code"] == NonFiniteError.code
    job.assert_untouched()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_a_copy(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut, "the file became shorter while it was read"),
        (replace_by_a_copy, "the file changed while it was being read"),
        (Path.unlink, "no such file"),
    ],
)
def test_an_input_that_changes_meanwhile_fails_the_merge(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    for seed, name in enumerate("AB"):
        write_model(tmp_path / f"{name}.safetensors", shrunk("sd1"), seed=seed)
    (tmp_path / "out").mkdir()
    job = write_job(tmp_path, tmp_path, tmp_path / "out" / "m.safetensors")
    job.start_over()
    recipe = load_recipe(job.recipe)
    victim = tmp_path / "B.safetensors"

    with pytest.raises(InputError, match=words) as caught:
        merge(recipe, force=True, progress=AtStart(lambda: change(victim)))

    assert caught.value.where == str(victim)
    job.assert_untouched()


def test_a_truncated_input_is_refused_with_its_share(models: Path, tmp_path: Path) -> None:
    whole = (models / "A.safetensors").read_bytes()
    (tmp_path / "A.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "B.safetensors").symlink_to(models / "B.safetensors")
    job = write_job(tmp_path, tmp_path, tmp_path / "m.safetensors")

    with pytest.raises(CkptError, match=r"model 'A': truncated: .* data bytes are there \(49\.\d"):
        merge(load_recipe(job.recipe))

    assert not job.output.exists()
    assert not job.part.exists()
