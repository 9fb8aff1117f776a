"""Does a model still work? Figures of single models here; verdicts are for callers to draw.

    denoise_loss   how well it takes noise off given pictures
    predict_noise  one step of the UNet, unguided

Needs the `render` extra: diffusers, transformers.
"""

from ckptools.check.losses import MOMENTS, denoise_loss, predict_noise, prompt_losses

__all__ = ["MOMENTS", "denoise_loss", "predict_noise", "prompt_losses"]
