"""Fixtures that every test file may use; the functions behind them are in `models.py`."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from models import shrunk, write_model

from ckptools import cli

# As the command line does: looking again and again through all that torch and diffusers hold takes
# a good part of the time.
gc.set_threshold(*cli._COLLECT_RARELY)
# Two processes that each run torch with two threads slow each other down fourfold.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start
settings.register_profile("ckptools", derandomize=True, deadline=None, database=None)
settings.load_profile("ckptools")

# The only reasons for which a test may be skipped where CI runs everything it can.
MAY_SKIP = ("no CUDA device", "no huge pages", "root may ", "needs root to mount")
_skipped: list[str] = []


def pytest_runtest_setup() -> None:
    """Ctrl-C is Python's own, whatever started the tests, and whatever a library left behind.

    A shell that starts something with "&" makes it ignore SIGINT, and so all that it starts.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if not reason.startswith(MAY_SKIP):
            _skipped.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("CI") and _skipped:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("CI") and _skipped:
        terminalreporter.section("skipped, and CI does not allow it")
        for line in _skipped:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def sd1_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Three narrow SD1 files (F16, 2 MB each) in one folder, named A, B and C. Do not change."""
    folder = tmp_path_factory.mktemp("sd1")
    specs = shrunk("sd1")
    one, two, three = (
        write_model(folder / f"{name}.safetensors", specs, seed=seed)
        for seed, name in enumerate("ABC", 1)
    )
    return one, two, three
