"""What `ckptools check` measures of good and bad models of the tiny family: its bounds' evidence.

    python examples/tiny/thresholds.py            # the models that the bounds were fitted on
    python examples/tiny/thresholds.py held-out   # other merges, other seeds: not looked at before

Every model is merged or damaged with plain torch, written, and checked through the same functions
as the command uses. Prints one row per model: what is expected, the verdict, and figures.
About three seconds a model on one core.
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptools.check import Report, Study, check_pipeline, check_weights, study_parents
from ckptools.render import load_pipeline
from ckptools.sources import open_checkpoint

TINY = Path(__file__).parents[2] / "ckptools" / "tiny"
UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
Model = dict[str, Tensor]
COLUMNS = (
    "weights.norms", "weights.kin", "weights.parents", "noise", "vae.round_trip",
    "latents.spread", "prompts.sensitivity", "prompts.gain", "barrier",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, its parents, and what the check should say: good, bad, or no matter ("?")."""

    name: str
    parents: str
    expected: str
    model: Model


def read(name: str) -> Model:
    """A member's tensors of floats, F32."""
    tensors = load_file(TINY / f"{name}.safetensors")
    return {key: value.float() for key, value in tensors.items() if value.is_floating_point()}


MEMBERS = {name: read(name) for name in "ABCIU"}
U = MEMBERS["U"]


def mixed(**shares: float) -> Model:
    """A sum of members; further input channels come from the member that has them."""
    members = [(MEMBERS[name], share) for name, share in shares.items()]
    made = {}
    for key in U:
        tensors = [(model[key], share) for model, share in members]
        wide = max((tensor for tensor, _ in tensors), key=lambda t: t.numel()).clone()
        width = min(tensor.shape[1] for tensor, _ in tensors) if wide.ndim > 1 else 0
        parts = [(tensor[:, :width] if width else tensor) * share for tensor, share in tensors]
        if width:
            wide[:, :width] = sum(parts)
        else:
            wide = sum(parts)
        made[key] = wide
    return made


def noisy(model: Model, share: float, prefix: str = "", seed: int = 0) -> Model:
    """Noise of a share of every tensor's own standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + share * value.std() * torch.randn(value.shape, generator=generator)
        if key.startswith(prefix) and value.numel() > 1
        else value
        for key, value in model.items()
    }


def shuffled(model: Model, prefix: str, seed: int = 0) -> Model:
    """The same numbers of every tensor, in another order."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value.flatten()[torch.randperm(value.numel(), generator=generator)].view(value.shape)
        if key.startswith(prefix)
        else value
        for key, value in model.items()
    }


def swapped(model: Model, other: Model, prefix: str) -> Model:
    """One component of another model."""
    return {key: other[key] if key.startswith(prefix) else value for key, value in model.items()}


def scaled(model: Model, factor: float, part: str) -> Model:
    """The tensors that have a word in their names, times a factor."""
    return {key: value * factor if part in key else value for key, value in model.items()}


def fitted() -> Iterator[Case]:
    """What the bounds were fitted on."""
    half = mixed(A=1, B=0.5, C=-0.5)
    for m in (0.0, 0.25, 0.5, 0.75, 1.0):
        yield Case(f"A + (B - C) * {m:g}", "AB", "good", mixed(A=1, B=m, C=-m))
    yield Case("0.5 A + 0.5 B", "AB", "good", mixed(A=0.5, B=0.5))
    yield Case("A + (I - C)", "AI", "good", mixed(A=1, I=1, C=-1))
    for x in (0.1, 0.25, 0.5, 0.75):
        bad = "bad" if x > 0.1 else "?"
        yield Case(f"{1 - x:g} C + {x:g} U", "CU", bad, mixed(C=1 - x, U=x))
    yield Case("A + (B - C) * 2", "AB", "?", mixed(A=1, B=2, C=-2))
    yield Case("A + (B - C) * 4", "AB", "bad", mixed(A=1, B=4, C=-4))
    yield Case("1.5 A", "AB", "bad", mixed(A=1.5))
    for share in (0.02, 0.1, 0.2, 0.3):
        expected = {0.02: "good", 0.3: "bad"}.get(share, "?")
        yield Case(f"half, {share:.0%} noise", "AB", expected, noisy(half, share))
    yield Case("half, U's text encoder", "AB", "bad", swapped(half, U, TEXT))
    yield Case("half, text encoder shuffled", "AB", "bad", shuffled(half, TEXT))
    yield Case(
        "half, text layers zero", "AB", "bad", scaled(half, 0.0, "text_model.encoder.layers")
    )
    yield Case("half, 30 % noise in the VAE", "AB", "bad", noisy(half, 0.3, VAE))
    yield Case("half, 30 % noise in the UNet", "AB", "bad", noisy(half, 0.3, UNET))
    yield Case("half, U's UNet", "AB", "bad", swapped(half, U, UNET))


def held_out() -> Iterator[Case]:
    """Other merges and other seeds, looked at when the bounds stood."""
    half = mixed(C=0.5, B=0.5)
    for m in (0.3, 0.9):
        yield Case(f"B + (A - C) * {m:g}", "AB", "good", mixed(B=1, A=m, C=-m))
        yield Case(f"{1 - m:.1g} B + {m:g} C", "BC", "good", mixed(B=1 - m, C=m))
        yield Case(f"{1 - m:.1g} A + {m:g} C", "AC", "good", mixed(A=1 - m, C=m))
    yield Case("B + (I - C)", "BI", "good", mixed(B=1, I=1, C=-1))
    yield Case("0.2 A + 0.4 B + 0.4 C", "ABC", "good", mixed(A=0.2, B=0.4, C=0.4))
    for x in (0.3, 0.5, 0.7):
        yield Case(f"{1 - x:g} A + {x:g} U", "AU", "bad", mixed(A=1 - x, U=x))
        yield Case(f"{1 - x:g} B + {x:g} U", "BU", "bad", mixed(B=1 - x, U=x))
    for seed in (1, 2):
        yield Case(f"BC half, 1 % noise {seed}", "BC", "good", noisy(half, 0.01, seed=seed))
        yield Case(f"BC half, 30 % noise {seed}", "BC", "bad", noisy(half, 0.3, seed=seed))
        yield Case(f"BC half, text shuffled {seed}", "BC", "bad", shuffled(half, TEXT, seed))
        yield Case(f"BC half, VAE 30 % {seed}", "BC", "bad", noisy(half, 0.3, VAE, seed))
    yield Case("BC half, U's text encoder", "BC", "bad", swapped(half, U, TEXT))
    yield Case("BC half, no attention to text", "BC", "bad", scaled(half, 0.0, "attn2.to_v"))
    yield Case("BC half, decoder x 1.5", "BC", "bad", scaled(half, 1.5, "decoder.up."))


def checked(case: Case, studies: dict[str, Study], folder: Path) -> Report:
    """As `ckptools check --against …` does it, with the parents studied once."""
    if case.parents not in studies:
        paths = {name: TINY / f"{name}.safetensors" for name in case.parents}
        studies[case.parents] = study_parents(paths)
    path = folder / "model.safetensors"
    save_file({key: value.half() for key, value in case.model.items()}, path)
    with ExitStack() as stack:
        model = stack.enter_context(open_checkpoint(path))
        bases = "" if "C" in case.parents or "U" in case.parents else "C"
        parents = {
            name: stack.enter_context(open_checkpoint(TINY / f"{name}.safetensors"))
            for name in case.parents + bases
        }
        found = check_weights(model, parents)
        pipeline = load_pipeline(model)
    shares = found.kin["unet"].shares
    report = check_pipeline(pipeline, parents=studies[case.parents], shares=shares)
    return Report((*found.checks, *report.checks), report.notes)


def row(case: Case, report: Report) -> str:
    """A line of a Markdown table: "?" behind a figure warns, "!" fails."""
    figures = {check.id: check for check in report.checks}
    marks: Mapping[str, str] = {"pass": "", "warn": "?", "fail": "!"}
    cells = [case.name, case.expected, report.verdict]
    for key in COLUMNS:
        one = figures.get(key)
        cells.append("" if one is None else f"{one.value:.2g}{marks[one.verdict]}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table; exit with 1 if a verdict is not what was expected."""
    torch.set_num_threads(1)
    cases = held_out() if sys.argv[1:] == ["held-out"] else fitted()
    studies: dict[str, Study] = {}
    wrong = 0
    print(f"| model | expected | verdict | {' | '.join(COLUMNS)} |")
    print("|---" * (3 + len(COLUMNS)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            report = checked(case, studies, Path(folder))
            print(row(case, report), flush=True)
            failed = report.verdict == "fail"
            wrong += case.expected != "?" and failed != (case.expected == "bad")
    print(f"{wrong} verdicts are not as expected")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
