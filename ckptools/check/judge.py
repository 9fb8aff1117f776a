"""From figures to verdicts: every bound of `ckptools check` that needs a resident model.

The bounds were fitted on the tiny family with `examples/tiny/thresholds.py`, and held against
merges and seeds that were not used for fitting: see `docs/checking.md` for the measured values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ckptools.check.figures import Figures, Reading
from ckptools.check.verdicts import Check, held
from ckptools.render import Pipeline

F16_MAX = 65504.0

# 1 - correlation of the answer to pure noise with that noise: alone
NOISE_WARN, NOISE_FAIL = 0.02, 0.05
# The same beside parents: least bounds, and factors of the worst parent's
NOISE_LEAST_WARN, NOISE_LEAST_FAIL = 0.004, 0.01
NOISE_RATIO_WARN, NOISE_RATIO_FAIL = 2.0, 5.0
# Loss over the straight line between the parents, or over the worst parent's
BARRIER_WARN, BARRIER_FAIL = 1.05, 1.25
# Largest activation; fp16 ends at 65504
HEADROOM_WARN = F16_MAX / 4
# PSNR of the VAE's round trip, in dB: alone, and below the parents' worst
ROUND_TRIP_WARN, ROUND_TRIP_FAIL = 20.0, 15.0
ROUND_TRIP_LOSS_WARN, ROUND_TRIP_LOSS_FAIL = 2.0, 6.0
DECODING_WARN, DECODING_FAIL = 20.0, 15.0
# How far answers to two prompts lie apart: alone, and relative to the parents' least
SENSITIVITY_WARN, SENSITIVITY_FAIL = 0.02, 0.005
SENSITIVITY_RATIO_WARN, SENSITIVITY_RATIO_FAIL = 0.5, 0.15
# What the right prompt is worth, relative to the parents' on the same pictures
GAIN_WARN, GAIN_FAIL = 0.6, 0.3
# Spread of the latents that it draws, out of the parents' range by a factor
SPREAD_WARN, SPREAD_FAIL = 1.5, 2.5


def judge(
    pipeline: Pipeline,
    found: Figures,
    parents: Sequence[Figures] = (),
    shares: Mapping[str, float] | None = None,
) -> Iterator[Check]:
    """Every check that the figures allow.

    pipeline  what was measured: its prediction and dtypes
    parents   figures on the same samples
    shares    parent → its share in the model's UNet, where that is known
    """
    yield _finite(found)
    yield _prediction(pipeline, found)
    if pipeline.prediction != "v":
        yield _noise(found, parents)
    yield from _headroom(found, parents)
    yield from _vae(found, parents)
    if found.own and parents:
        yield from _drawing(found, parents)
    if found.reading is None:
        return
    readings = [one.reading for one in parents if one.reading is not None]
    yield _sensitivity(found.reading, readings)
    if readings:
        yield _gain(found.reading, readings)
        yield _barrier(found.reading, parents, shares or {})


def _finite(found: Figures) -> Check:
    broken = [(component, names) for component, names in found.broken.items()]
    steps = [sample.broken for sample in found.own if sample.broken]
    reason = "every module's answer is a number"
    if broken:
        component, names = broken[0]
        reason = f"{component} gives NaN or Inf first at {', '.join(names[:2])}"
    elif steps:
        reason = f"NaN or Inf from step {min(steps)} of drawing on"
    count = len(broken) + len(steps)
    tensors = [name for _, names in broken[:1] for name in names]
    return held("finite", count, warn=0, fail=0, reason=reason, tensors=tensors)


# --- what the UNet predicts ---------------------------------------------------------------------


def _prediction(pipeline: Pipeline, found: Figures) -> Check:
    """Near 1 for epsilon, near 0 for v: between is no answer, and nobody is blamed for it."""
    said, by = pipeline.prediction or "epsilon", pipeline.told_by or "nobody"
    value = found.noise
    seen = "epsilon" if value > 0.8 else "v" if abs(value) < 0.4 else ""
    words = f"its {by} says {said}, one step of the UNet (correlation {value:.3f}) says {seen}"
    if not math.isfinite(value):
        return Check("prediction", value, None, "warn", "one step of the UNet gives no number")
    if seen and seen != said:
        fix = f"; load it as a model that predicts {seen}, and mend the label"
        return Check("prediction", value, 0.5, "fail", words + fix)
    return Check("prediction", value, 0.5, "pass", words if seen else f"its {by} says {said}")


def _noise(found: Figures, parents: Sequence[Figures]) -> Check:
    missing = 1 - found.noise
    warn, fail = NOISE_WARN, NOISE_FAIL
    reason = f"of pure noise, the UNet recognises all but {missing:.4f}"
    if parents:
        usual = max(1 - one.noise for one in parents)
        warn = max(NOISE_LEAST_WARN, NOISE_RATIO_WARN * usual)
        fail = max(NOISE_LEAST_FAIL, NOISE_RATIO_FAIL * usual)
        reason += f" (the worst parent: {usual:.4f})"
    return held("noise", missing, warn=warn, fail=fail, reason=reason)


def _barrier(found: Reading, parents: Sequence[Figures], shares: Mapping[str, float]) -> Check:
    """The loss on the parents' pictures, against the straight line between the parents' losses."""
    losses = {one.name: one.reading.loss for one in parents if one.reading is not None}
    line = _line(losses, shares)
    if line is None:
        worst = max(losses, key=lambda name: losses[name])
        line, what = losses[worst], f"that of {worst}, the worst parent"
    else:
        mix = " + ".join(f"{shares[name]:.2f} {name}" for name in losses)
        what = f"that of the parents between them ({mix})"
    ratio = found.loss / line
    reason = f"loss {found.loss:.4f} on the parents' pictures; {what}, is {line:.4f}"
    return held("barrier", ratio, warn=BARRIER_WARN, fail=BARRIER_FAIL, reason=reason)


def _line(losses: Mapping[str, float], shares: Mapping[str, float]) -> float | None:
    """The parents' losses by their shares; None where the model lies not between them."""
    known = [shares.get(name) for name in losses]
    if any(share is None or share < -0.02 for share in known):
        return None
    total = sum(share or 0.0 for share in known)
    if not 0.95 < total < 1.05:
        return None
    return sum(losses[name] * (shares[name]) for name in losses) / total


# --- the prompt ---------------------------------------------------------------------------------


def _sensitivity(found: Reading, parents: Sequence[Reading]) -> Check:
    value = found.sensitivity
    usual = min((one.sensitivity for one in parents), default=0.0)
    reason = f"another prompt changes the UNet's answer by {value:.1%}"
    if parents:
        reason += f" (the parents: {usual:.1%} at least)"
    return held(
        "prompts.sensitivity",
        value,
        warn=max(SENSITIVITY_WARN, SENSITIVITY_RATIO_WARN * usual),
        fail=max(SENSITIVITY_FAIL, SENSITIVITY_RATIO_FAIL * usual),
        reason=reason,
        least=True,
    )


def _gain(found: Reading, parents: Sequence[Reading]) -> Check:
    """Whether the right prompt helps: a text encoder of another model speaks another language."""
    usual = min(one.gain for one in parents)
    value = found.gain / usual if usual > 0 else 1.0
    reason = (
        f"a wrong prompt costs {found.gain:.0%} of the loss, in the parents {usual:.0%} at least"
    )
    return held("prompts.gain", value, warn=GAIN_WARN, fail=GAIN_FAIL, reason=reason, least=True)


# --- numbers and pictures -----------------------------------------------------------------------


def _headroom(found: Figures, parents: Sequence[Figures]) -> Iterator[Check]:
    for component, (size, names) in found.largest.items():
        usual = max(
            (one.largest[component][0] for one in parents if component in one.largest), default=0.0
        )
        where = names[0] if names else component
        reason = f"the largest number in {component} is {size:.4g}, at {where}; fp16 ends at 65504"
        if size > HEADROOM_WARN and usual > size / 2:
            reason += f" (the parents': {usual:.4g})"
        warn = max(HEADROOM_WARN, 2 * usual)
        yield held(
            f"headroom.{component}", size, warn=warn, fail=math.inf, reason=reason, tensors=names
        )


def _vae(found: Figures, parents: Sequence[Figures]) -> Iterator[Check]:
    usual = min((one.round_trip for one in parents), default=math.inf)
    warn, fail = ROUND_TRIP_WARN, ROUND_TRIP_FAIL
    if parents:
        warn, fail = usual - ROUND_TRIP_LOSS_WARN, usual - ROUND_TRIP_LOSS_FAIL
    reason = f"pictures come back from the VAE with {found.round_trip:.1f} dB"
    if parents:
        reason += f" (the parents: {usual:.1f} dB at least)"
    yield held("vae.round_trip", found.round_trip, warn=warn, fail=fail, reason=reason, least=True)
    if parents and found.decoding is not None:
        reason = f"it decodes the parents' latents with {found.decoding:.1f} dB"
        if math.isinf(found.decoding):
            reason = "it decodes the parents' latents to the parents' pictures"
        yield held(
            "vae.decoding", found.decoding, warn=DECODING_WARN, fail=DECODING_FAIL,
            reason=reason, least=True,
        )  # fmt: skip


def _drawing(found: Figures, parents: Sequence[Figures]) -> Iterator[Check]:
    spreads = [one.spread for one in parents if one.own]
    if not spreads:
        return
    value = float(np.max([found.spread / max(spreads), min(spreads) / found.spread]))
    reason = (
        f"its latents spread {found.spread:.2f}, the parents' {min(spreads):.2f} "
        f"to {max(spreads):.2f}"
    )
    yield held("latents.spread", value, warn=SPREAD_WARN, fail=SPREAD_FAIL, reason=reason)
