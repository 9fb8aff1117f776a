"""The Hugging Face Hub: models read from it (`remote`), models published to it (`upload`).

The only package that imports huggingface_hub, and that inside its functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ckptools.errors import UsageError
from ckptools.hubref import is_local
from ckptools.sources import open_checkpoint

if TYPE_CHECKING:
    from ckptools.checkpoint import Checkpoint


def look(path: Path) -> Checkpoint:
    """Open a model here, or one on the Hub by its header alone; what it costs is two requests.

    Raises as `open_checkpoint` does, and `InputError` for a pickle on the Hub.
    """
    if is_local(path):
        return open_checkpoint(path)
    from ckptools.hub.remote import Hub  # loads the Hub's client

    return Hub().look(path)


def is_offline() -> bool:
    """Whether the user does not want the Hub to be asked (`HF_HUB_OFFLINE`)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def require_client() -> None:
    """A `UsageError` where the Hub's client is older than 1.0, whose requests are others.

    Merging local files works with any: transformers 4 asks for an older one.
    """
    from importlib.metadata import version  # slow to load

    found = version("huggingface_hub")
    if int(found.partition(".")[0]) < 1:
        raise UsageError(
            f"the Hub needs huggingface_hub 1.0 or later; {found} is installed",
            fix="pip install -U huggingface_hub (transformers 5 goes with it)",
        )
