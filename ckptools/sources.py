"""Opens whatever a user calls a model: the one door for every command.

Single files, shards, pickles and diffusers folders all become a `Checkpoint`. Must not know
recipes or what the numbers mean.
"""

from __future__ import annotations

from pathlib import Path

from ckptools.checkpoint import Checkpoint, open_safetensors


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.safetensors` file, a `*.index.json` of shards, or a folder that holds one of them.

    Reads headers only. Raises `InputError`, `InvalidFileError` or `UnsafeError`.
    """
    return open_safetensors(path)
