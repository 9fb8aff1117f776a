"""The real client of the Hub against the one of this machine, for tests of models on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub


@contextmanager
def hub_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, token: str = ""
) -> Iterator[LoopbackHub]:
    """A Hub whose client keeps its cache and its token in `folder`, and nothing anywhere else."""
    from huggingface_hub import constants

    with LoopbackHub(folder / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
