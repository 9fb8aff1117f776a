"""Does a model still work? Figures held against bounds; nothing printed, nothing kept.

    report = check_pipeline(pipeline)                       # one model, alone
    study = study_parents({"A": path_a, "B": path_b})       # loaded one after the other
    report = check_pipeline(pipeline, parents=study)        # beside those it was merged from
    check_weights(checkpoint, {"A": open_a, "B": open_b})   # stored values only; no torch

    judge_control  what a ControlNet does to pictures
    denoise_loss   how well a model takes noise off given pictures
    Merged         a merge that is not written, as if it were an open checkpoint

All but `check_weights` need the `render` extra: diffusers, transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptools.check.verdicts import Check, Report
from ckptools.check.weights import Kin, Weights, WeightsFound, check_weights

if TYPE_CHECKING:
    from ckptools.check.control import draw_control, judge_control
    from ckptools.check.losses import MOMENTS, denoise_loss, predict_noise, prompt_losses
    from ckptools.check.merged import Merged
    from ckptools.check.models import Study, check_pipeline, study_parents

__all__ = [
    "MOMENTS",
    "Check",
    "Kin",
    "Merged",
    "Report",
    "Study",
    "Weights",
    "WeightsFound",
    "check_pipeline",
    "check_weights",
    "denoise_loss",
    "draw_control",
    "judge_control",
    "predict_noise",
    "prompt_losses",
    "study_parents",
]

_HOMES = {
    "MOMENTS": "losses",
    "denoise_loss": "losses",
    "predict_noise": "losses",
    "prompt_losses": "losses",
    "Merged": "merged",
    "draw_control": "control",
    "judge_control": "control",
    "Study": "models",
    "check_pipeline": "models",
    "study_parents": "models",
}


def __getattr__(name: str) -> Any:
    """What needs torch, imported when it is first asked for."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
