"""Samplers by the names that AUTOMATIC1111 gave them, as diffusers' schedulers.

Source of the correspondence: diffusers 0.42 documentation, api/schedulers/overview. Of the web UI's
samplers, diffusers has no DPM++ 2S a, DPM fast, DPM adaptive or Restart, and DPM++ 3M SDE in its
later versions only.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ckptools.errors import UsageError, nearest
from ckptools.render.configs import PREDICTIONS


@dataclass(frozen=True)
class Sampler:
    """One row of the table.

    name       AUTOMATIC1111's
    scheduler  diffusers' class
    options    its arguments
    spacing    how it takes its steps from the 1000 of the training
    """

    name: str
    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    spacing: str = "linspace"


_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_EXPONENTIAL = {"use_exponential_sigmas": True}
_SINGLE = {**_SDE, "lower_order_final": True}  # any number of steps will do

SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        row.name: row
        for row in (
            Sampler("DPM++ 2M Karras", "DPMSolverMultistepScheduler", _KARRAS),
            Sampler("DPM++ 2M", "DPMSolverMultistepScheduler"),
            Sampler("DPM++ 2M SDE Karras", "DPMSolverMultistepScheduler", {**_KARRAS, **_SDE}),
            Sampler("DPM++ 2M SDE", "DPMSolverMultistepScheduler", _SDE),
            Sampler(
                "DPM++ 2M SDE Exponential", "DPMSolverMultistepScheduler", {**_EXPONENTIAL, **_SDE}
            ),
            Sampler("DPM++ SDE Karras", "DPMSolverSinglestepScheduler", {**_KARRAS, **_SINGLE}),
            Sampler("DPM++ SDE", "DPMSolverSinglestepScheduler", _SINGLE),
            Sampler("Euler", "EulerDiscreteScheduler"),
            Sampler("Euler Karras", "EulerDiscreteScheduler", _KARRAS),
            Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
            Sampler("Heun", "HeunDiscreteScheduler"),
            Sampler("Heun Karras", "HeunDiscreteScheduler", _KARRAS),
            Sampler("DPM2", "KDPM2DiscreteScheduler"),
            Sampler("DPM2 Karras", "KDPM2DiscreteScheduler", _KARRAS),
            Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
            Sampler("DPM2 a Karras", "KDPM2AncestralDiscreteScheduler", _KARRAS),
            Sampler("LMS", "LMSDiscreteScheduler"),
            Sampler("LMS Karras", "LMSDiscreteScheduler", _KARRAS),
            Sampler("DDIM", "DDIMScheduler", spacing="leading"),
            Sampler("PLMS", "PNDMScheduler", {"skip_prk_steps": True}, spacing="leading"),
            Sampler("UniPC", "UniPCMultistepScheduler"),
            Sampler("LCM", "LCMScheduler", spacing="leading"),
        )
    }
)


def make_scheduler(
    sampler: str, base: Mapping[str, Any], *, prediction: str, zero_snr: bool = False
) -> Any:
    """A new scheduler of diffusers.

    base        keys of a scheduler's folder; its `timestep_spacing` goes before the sampler's own
    prediction  epsilon or v
    zero_snr    the noise schedule is rescaled to end at zero signal, and steps are counted from
                its end (Lin et al. 2023, arXiv 2305.08891); only some samplers can

    An unknown sampler, or one that cannot, is a `UsageError`.
    """
    import diffusers

    row = find_sampler(sampler)
    kind = getattr(diffusers, row.scheduler)
    known = inspect.signature(kind.__init__).parameters
    spacing = "trailing" if zero_snr else base.get("timestep_spacing", row.spacing)
    if zero_snr and "rescale_betas_zero_snr" not in known:
        raise UsageError(
            f"{row.name} cannot draw with a model whose noise ends at zero signal",
            fix="take Euler, Euler a, DDIM or DPM++ 2M",
        )
    keys = {
        **base,
        "prediction_type": PREDICTIONS[prediction],
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
        **row.options,
    }
    try:
        with _in_silence():
            return kind(**{key: value for key, value in keys.items() if key in known})
    except ImportError as exc:  # diffusers' stand-in for a class whose needs are not installed
        raise UsageError(
            f"{row.name} needs SciPy", fix="pip install scipy, or take another sampler"
        ) from exc


def set_steps(scheduler: Any, steps: int, device: Any) -> Any:
    """Tell a scheduler its number of steps; its timesteps."""
    with _in_silence():
        scheduler.set_timesteps(steps, device=device)
    return scheduler.timesteps


@contextmanager
def _in_silence() -> Iterator[None]:
    """diffusers' schedulers give torch's tensors to NumPy 2 in a way that is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def find_sampler(name: str) -> Sampler:
    """A row of the table, upper or lower case; `UsageError` for an unknown name."""
    by_name = {row.name.casefold(): row for row in SAMPLERS.values()}
    if name.casefold() not in by_name:
        raise UsageError(f"no sampler {name!r}", fix=nearest(name, SAMPLERS))
    return by_name[name.casefold()]
