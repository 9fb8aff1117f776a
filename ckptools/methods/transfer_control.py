"""transfer_control: a ControlNet for another base model, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptools.methods import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    access="linear",
    formula="control + (new_base - old_base)",
    source="lllyasviel/ControlNet, tool_transfer_control.py; "
    "Mikubill/sd-webui-controlnet, issue 73",
    kinds={"control": "controlnet", "new_base": "checkpoint", "old_base": "checkpoint"},
)
def transfer_control(control: Tensor, new_base: Tensor, old_base: Tensor) -> Tensor:
    """A ControlNet moved to a new base by what that base learned since the old one.

    control   a ControlNet trained on old_base; it decides names, dtypes and all that is its own:
              the hint block and the zero convolutions are kept as they are
    new_base, old_base  models of its family, read where the ControlNet began as a copy of them
              (UNet input blocks, middle block, embeddings); there all three have the same shape.
              Of an inpainting model the first 4 input channels are read
    The result is a ControlNet, the size of control. Where new_base equals old_base it is control.

    It is an approximation: the change that training made to the copy is laid on another base. Its
    author holds that going without is wrong in theory though it often works; later practice mostly
    does without. A ControlNet often works on near fine-tunes as it is, so draw with both and look.
    """
    return control + (new_base - old_base)
