"""What the checks of ControlNets measure of sound and broken ones: their bounds' evidence.

    python examples/tiny/control_thresholds.py            # what the bounds were fitted on
    python examples/tiny/control_thresholds.py held-out   # other seeds, conditions and damage

Every ControlNet is damaged with plain torch, written, and drawn with as `ckptools render --control`
does: two prompts, with and without it. Prints a row for each: what is expected, the verdict, the
figures. About two seconds a ControlNet on one core.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from thresholds import Model, noisy, scaled, shuffled

from ckptools.check import Check, judge_control
from ckptools.render import Pipeline, Request, draw, load_controlnet, load_pipeline
from ckptools.render.conditions import draw_condition, find_edges
from ckptools.render.probes import SHAPES, drawn_shape

TINY = Path(__file__).parents[2] / "ckptools" / "tiny"
SIZE = (64, 64)
ZERO, MIDDLE, HINT = "zero_convs", "middle_block_out", "input_hint_block"
CONTROL: Model = {k: v.float() for k, v in load_file(TINY / "control.safetensors").items()}
CONDITIONS = {
    "star": draw_condition("edges", SIZE),
    "square": find_edges(drawn_shape(SIZE)),
    "room": draw_condition("lines", SIZE),
}


@dataclass(frozen=True)
class Case:
    """A ControlNet on a base, and what the checks should say: good, bad, or no matter ("?")."""

    name: str
    base: str
    expected: str
    model: Model
    condition: str = "star"
    seed: int = 1


def silent(model: Model) -> Model:
    """Zero convolutions, as they are before the training."""
    return scaled(scaled(model, 0.0, ZERO), 0.0, MIDDLE)


def with_part(change: Callable[[Model], Model], part: str) -> Model:
    """A change of the tensors alone that have a word in their names."""
    changed = change(CONTROL)
    return {key: changed[key] if part in key else value for key, value in CONTROL.items()}


def fitted() -> Iterator[Case]:
    """What the bounds were fitted on."""
    yield Case("as trained, on C", "C", "good", CONTROL)
    yield Case("as trained, on A", "A", "good", CONTROL)
    yield Case("as trained, on B", "B", "good", CONTROL)
    yield Case("as trained, on U, a stranger", "U", "?", CONTROL)
    for share in (0.1, 0.3, 1.0, 2.0):
        expected = "good" if share < 1 else "bad" if share > 1 else "?"
        yield Case(f"{share:.0%} noise", "C", expected, noisy(CONTROL, share))
    yield Case("zero convolutions zero", "C", "bad", silent(CONTROL))
    yield Case("condition not read", "C", "bad", scaled(CONTROL, 0.0, f"{HINT}.14"))
    yield Case("all shuffled", "C", "bad", shuffled(CONTROL, ""))
    yield Case(
        "condition's layers shuffled", "C", "bad", with_part(lambda m: shuffled(m, ""), HINT)
    )
    yield Case("zero convolutions shuffled", "C", "bad", with_part(lambda m: shuffled(m, ""), ZERO))
    yield Case("half of its strength", "C", "good", scaled(scaled(CONTROL, 0.5, ZERO), 0.5, MIDDLE))
    yield Case("a fifth of it", "C", "?", scaled(scaled(CONTROL, 0.2, ZERO), 0.2, MIDDLE))


def held_out() -> Iterator[Case]:
    """Looked at when the bounds stood."""
    for base in "ABC":
        yield Case(f"as trained, on {base}", base, "good", CONTROL, "square", 11)
    for seed in (11, 12):
        yield Case(f"as trained, seed {seed}", "C", "good", CONTROL, "star", seed)
        yield Case(
            f"5 % noise, seed {seed}", "C", "good", noisy(CONTROL, 0.05, "", seed), "star", seed
        )
        yield Case(
            f"300 % noise, seed {seed}", "C", "bad", noisy(CONTROL, 3.0, "", seed), "star", seed
        )
        yield Case(f"shuffled, seed {seed}", "C", "bad", shuffled(CONTROL, "", seed), "star", seed)
    yield Case("as trained, a room", "C", "?", CONTROL, "room", 11)
    yield Case("zero convolutions zero, on A", "A", "bad", silent(CONTROL), "square", 11)
    yield Case(
        "condition not read, on B", "B", "bad", scaled(CONTROL, 0.0, f"{HINT}.14"), "square", 11
    )
    yield Case(
        "zero convolutions shuffled", "C", "bad",
        with_part(lambda m: shuffled(m, "", 5), ZERO), "square", 11,
    )  # fmt: skip


def requests(case: Case) -> list[Request]:
    """Two prompts whose shapes are not the condition's."""
    names = ("circle", "cross") if case.seed == 1 else ("ring", "cross")
    prompts = [probe.prompt for probe in SHAPES if probe.id in names]
    return [
        Request(prompt, seed=case.seed, steps=8, cfg=3.0, size=SIZE, sampler="DPM++ 2M Karras")
        for prompt in prompts
    ]


def checked(case: Case, bases: dict[str, Pipeline], folder: Path) -> Sequence[Check]:
    """As a rendering does it."""
    if case.base not in bases:
        bases[case.base] = load_pipeline(TINY / f"{case.base}.safetensors")
    pipeline, condition = bases[case.base], CONDITIONS[case.condition]
    path = folder / "control.safetensors"
    save_file({key: value.half().contiguous() for key, value in case.model.items()}, path)
    control = load_controlnet(path, pipeline)
    asked = requests(case)
    without = [draw(pipeline, each).pixels for each in asked]
    drawn = [
        draw(pipeline, replace(each, control=condition), controlnet=control).pixels
        for each in asked
    ]
    return tuple(judge_control(drawn, without, condition))


def main() -> None:
    """Print the table; exit with 1 if a verdict is not what was expected."""
    torch.set_num_threads(1)
    cases = held_out() if sys.argv[1:] == ["held-out"] else fitted()
    bases: dict[str, Pipeline] = {}
    marks = {"pass": "", "warn": "?", "fail": "!"}
    wrong = 0
    print("| ControlNet | condition | expected | verdict | `control.alive` | `control.follows` |")
    print("|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            found = checked(case, bases, Path(folder))
            verdict = max((check.verdict for check in found), key=[*marks].index)
            figures = [f"{check.value:.2g}{marks[check.verdict]}" for check in found]
            cells = [case.name, case.condition, case.expected, verdict, *figures]
            print(f"| {' | '.join(cells)} |", flush=True)
            wanted = {"good": ("pass",), "bad": ("fail",)}.get(case.expected, (*marks,))
            wrong += verdict not in wanted
    print(f"{wrong} verdicts are not as expected")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
