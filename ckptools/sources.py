"""Opens whatever a user calls a model: the one door for every command.

Single files, shards, pickles and diffusers folders all become a `Checkpoint`. Must not know
recipes or what the numbers mean.
"""

from __future__ import annotations

from pathlib import Path

from ckptools.checkpoint import Checkpoint, is_folder, open_safetensors, weights_in
from ckptools.errors import InputError
from ckptools.folders import Opener, from_diffusers, is_diffusers_folder, open_folder
from ckptools.hubref import hub_ref_of
from ckptools.pickles import is_pickle, open_pickle

__all__ = ["Opener", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.safetensors` file, shards by their index, a PyTorch pickle, or a folder of weights.

    A diffusers folder, or a component of one, is seen under the names of single files. Reads
    headers only. Raises `InputError`, `InvalidFileError` or `UnsafeError`.
    """
    ref = hub_ref_of(path)
    if ref is not None:
        raise InputError(
            "a model on the Hub, where a file of this machine is wanted",
            where=str(ref),
            fix=f"run `hf download {ref.repo} {ref.file}`".rstrip("` ") + "` and give its path",
        )
    if is_diffusers_folder(path):
        return open_folder(path, _open_file)
    return from_diffusers(_open_file(path))


def _open_file(path: Path) -> Checkpoint:
    """One file, the index of shards, or a folder that holds one of them."""
    if is_folder(path):
        path = weights_in(path)
    return open_pickle(path) if is_pickle(path) else open_safetensors(path)
