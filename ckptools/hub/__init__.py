"""The Hugging Face Hub: models read from it (`remote`), models published to it (`upload`).

The only package that imports huggingface_hub, and that inside its functions.
"""

from importlib.metadata import version

from ckptools.errors import UsageError


def require_client() -> None:
    """A `UsageError` where the Hub's client is older than 1.0, whose requests are others.

    Merging local files works with any: transformers 4 asks for an older one.
    """
    found = version("huggingface_hub")
    if int(found.partition(".")[0]) < 1:
        raise UsageError(
            f"the Hub needs huggingface_hub 1.0 or later; {found} is installed",
            fix="pip install -U huggingface_hub (transformers 5 goes with it)",
        )
