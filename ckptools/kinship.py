"""How near relatives models are. ControlNets and LoRAs work on near kin of what they learnt on.

Measured are matrices and kernels only: norms and biases are alike in all models. The distance of
two models is |A - B| / sqrt(|A| |B|). It is 0 for copies; weights that have nothing to do with each
other are at sqrt(2) or beyond, whatever their norms, since their cosine is 0. What the bounds rest
on is told in `docs/inspection.md`; needs numpy, never torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ckptools.checkpoint import Checkpoint, json_beside
from ckptools.errors import InputError, UsageError
from ckptools.family import Detection, Family, detect, family_of, kind_words
from ckptools.hashing import Progress, Silent, hash_source
from ckptools.lora.group import PEFT_CONFIG
from ckptools.sources import open_checkpoint

if TYPE_CHECKING:
    from ckptools.measure import Gram, Pair

Verdict = Literal["same", "near", "distant", "unknown", "permuted", "unrelated", "other-family"]

# From the best to the worst
VERDICTS: Mapping[Verdict, str] = {
    "same": "the same values",
    "near": "near kin: fine-tunes or merges of one model; adapters and ControlNets carry over",
    "distant": "distant kin: a common origin, far apart; adapters and ControlNets may fail",
    "unknown": "nothing tells how near they are",
    "permuted": "the same numbers in another order: do not merge them, nor carry adapters over",
    "unrelated": "unrelated: trained independently; merges and adapters will not work",
    "other-family": "models of different families: nothing carries over",
}
KIN: tuple[Verdict, ...] = ("same", "near", "distant", "unknown")
NEAR = 0.3
DISTANT = 1.0
_SAME_NORM = 1e-5  # of two matrices that hold the same numbers in another order
_MOST = 0.9
_LEAST_COMMON = 0.5
_BYSTANDERS = ("vae", "other")  # they are exchanged freely and say nothing about kin
_TRAINED_ON = (
    "ss_sd_model_name", "ss_base_model_version", "ss_sd_model_hash", "ss_new_sd_model_hash",
    "modelspec.architecture", "modelspec.merged_from",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """How a component of A lies to that of B.

    distance  |A - B| / sqrt(|A| |B|)
    cosine    of the angle between them; NaN where one is zero
    tensors   how many were measured
    """

    distance: float
    cosine: float
    tensors: int
    verdict: Verdict


@dataclass(frozen=True)
class Tasks:
    """What A and B learnt beyond their base C, in one component.

    cosine        of A - C and B - C; NaN where one of them is zero
    size_a, size_b  |A - C| / |C|, |B - C| / |C|
    """

    cosine: float
    size_a: float
    size_b: float


@dataclass(frozen=True)
class Relation:
    """Two models: the verdict is that of the worst component that takes part in it."""

    a: Path
    b: Path
    verdict: Verdict
    reason: str
    groups: Mapping[str, Group] = field(default_factory=dict)
    tasks: Mapping[str, Tasks] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suits:
    """Whether an adapter suits a model.

    trained_on  what the adapter's metadata says of its base
    families    what its modules fit, as far as that is told
    """

    adapter: Path
    model: Path
    verdict: Verdict
    reason: str
    families: tuple[str, ...]
    trained_on: Mapping[str, str]


@dataclass(frozen=True)
class Kinship:
    """All pairs of the models, and what there is to say about an adapter."""

    relations: tuple[Relation, ...]
    adapters: tuple[Suits, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The adapter's worst verdict if one was asked about, else the worst of the pairs."""
        found = [one.verdict for one in (self.adapters or self.relations)]
        return max(found, key=list(VERDICTS).index)


@dataclass(frozen=True, eq=False)
class _Model:
    """An open model. own: the family's usual name of each matrix -> the file's name."""

    checkpoint: Checkpoint
    detection: Detection
    family: Family
    own: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.checkpoint.path


def compare_models(
    paths: Sequence[Path],
    *,
    base: Path | None = None,
    adapter: Path | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Kinship:
    """Every pair of the models, and of each with the base; or whether an adapter suits them.

    base     what they were trained from: then the directions they took are compared too
    adapter  a LoRA or ControlNet; with it, `base` is the model that it was trained on
    """
    progress = progress or Silent()
    if len(paths) + (base is not None) < 2 and adapter is None:
        raise UsageError("there is only one model", fix="give two, or --base, or --for")
    with ExitStack() as stack:
        models = [_open(path, stack) for path in paths]
        root = None if base is None else _open(base, stack)
        pairs = [] if adapter is not None else list(combinations(models, 2))
        pairs += [(model, root) for model in models if root is not None]
        relations = [_relate(a, b, threads, progress) for a, b in pairs]
        if root is not None:
            relations = [
                _with_tasks(one, pair, root, threads, progress) if root not in pair else one
                for one, pair in zip(relations, pairs, strict=True)
            ]
        suits = [] if adapter is None else _judge_adapter(adapter, models, root, relations)
        for model in (*models, *([root] if root else [])):
            model.checkpoint.check_unchanged()
    return Kinship(tuple(relations), tuple(suits))


def _open(path: Path, stack: ExitStack) -> _Model:
    checkpoint = stack.enter_context(open_checkpoint(path))
    detection = detect(checkpoint, checkpoint.metadata)
    if detection.kind in ("lora", "embedding"):
        raise InputError(
            f"this is {kind_words(detection)}, not a model",
            where=str(path),
            fix=f"ask whether it suits a model: ckptools kinship MODEL --for {path.name}",
        )
    family = family_of(detection)
    own: dict[str, str] = {}
    for name, spec in checkpoint.items():
        usual = family.canonical_name(name)
        if spec.is_float and sum(size > 1 for size in spec.shape) > 1:
            own[usual] = name if name == usual else own.get(usual, name)
    return _Model(checkpoint, detection, family, own)


# --- two models --------------------------------------------------------------------------------


def _relate(a: _Model, b: _Model, threads: int, progress: Progress) -> Relation:
    from ckptools.measure import Row, common_shape, measure_pairs

    if a.detection.family != b.detection.family:
        words = [one.detection.family or one.detection.kind for one in (a, b)]
        return Relation(a.path, b.path, "other-family", f"{words[0]} and {words[1]}")
    common = [name for name in a.own if name in b.own]
    most = max(len(a.own), len(b.own))
    if len(common) < _LEAST_COMMON * most:
        reason = f"only {len(common):,} of {most:,} matrices have the same name"
        return Relation(a.path, b.path, "other-family", reason)
    rows = []
    for name in common:
        row = Row(name, ((a.checkpoint, a.own[name]), (b.checkpoint, b.own[name])))
        if common_shape(row.specs) is not None:
            rows.append(row)
    progress.start("comparing", sum(row.nbytes for row in rows))
    pairs = measure_pairs(rows, threads=threads, advance=progress.advance)
    members: dict[str, list[Pair]] = {}
    for name, pair in pairs.items():
        members.setdefault(a.family.component_of(name), []).append(pair)
    order = [*a.family.components, "other"]
    groups = {
        component: _group(members[component])
        for component in sorted(members, key=order.index)
    }  # fmt: skip
    verdict, reason = _overall(groups)
    notes = _notes(a, b, len(common) - len(rows), sum(pair.nonfinite for pair in pairs.values()))
    return Relation(a.path, b.path, verdict, reason, groups, notes=notes)


def _group(pairs: Sequence[Pair]) -> Group:
    total = pairs[0]
    for pair in pairs[1:]:
        total += pair
    norms = math.sqrt(math.sqrt(total.a_squares) * math.sqrt(total.b_squares))
    distance = total.distance / norms if norms else (math.inf if total.changed else 0.0)
    if not total.changed:
        verdict: Verdict = "same"
    elif distance <= NEAR:
        verdict = "near"
    elif _is_permuted(pairs):
        verdict = "permuted"
    else:
        verdict = "distant" if distance <= DISTANT else "unrelated"
    return Group(distance, total.cosine, len(pairs), verdict)


def _is_permuted(pairs: Sequence[Pair]) -> bool:
    """Whether the matrices have equal norms one by one, and are different all the same.

    Neurons in another order keep every norm; independent matrices of n values agree to 1/sqrt(n).
    """
    moved = [pair for pair in pairs if pair.changed and pair.a_squares and pair.b_squares]
    equal = [
        pair for pair in moved if abs(pair.a_squares / pair.b_squares - 1) < _SAME_NORM
    ]  # fmt: skip
    return bool(moved) and len(equal) >= _MOST * len(moved)


def _overall(groups: Mapping[str, Group]) -> tuple[Verdict, str]:
    """The worst component decides; which may be exchanged freely does not, unless it is alone."""
    deciding = {name: g for name, g in groups.items() if name not in _BYSTANDERS} or groups
    if not deciding:
        return "unknown", "there is nothing to compare"
    order = list(VERDICTS)
    worst = max(deciding, key=lambda name: (order.index(deciding[name].verdict),
                                            deciding[name].distance))  # fmt: skip
    group = deciding[worst]
    if group.verdict == "same":
        return "same", "no value differs" if len(groups) == 1 else f"{', '.join(deciding)} equal"
    return group.verdict, f"{worst} at distance {group.distance:.3f}"


def _notes(a: _Model, b: _Model, unequal: int, nonfinite: int) -> tuple[str, ...]:
    notes = []
    if a.detection.variant != b.detection.variant:
        notes.append(
            f"variants differ ({a.detection.variant}, {b.detection.variant}): "
            "extra input channels are left out"
        )
    predictions = {one.detection.prediction for one in (a, b)} - {None}
    if len(predictions) > 1:
        notes.append(
            f"they predict different things: {' and '.join(sorted(map(str, predictions)))}"
        )
    lacking = len(a.own.keys() ^ b.own.keys())
    if lacking:
        notes.append(f"{lacking:,} matrices are in one of them only")
    if unequal:
        notes.append(f"{unequal:,} matrices have shapes without a common part")
    if nonfinite:
        notes.append(f"{nonfinite:,} NaN or Inf values are left out")
    return tuple(notes)


# --- with their base ---------------------------------------------------------------------------


def _with_tasks(
    relation: Relation,
    pair: tuple[_Model, _Model],
    base: _Model,
    threads: int,
    progress: Progress,
) -> Relation:
    """The relation, with what both learnt beyond the base.

    Source of task vectors and their cosines: Ilharco et al. 2023, arXiv 2212.04089, section 5.
    """
    from ckptools.measure import Row, common_shape, measure_gram

    if not relation.groups or base.detection.family != pair[0].detection.family:
        return relation
    models = (*pair, base)
    rows = []
    for name in pair[0].own:
        if all(name in model.own for model in models):
            row = Row(name, tuple((model.checkpoint, model.own[name]) for model in models))
            if common_shape(row.specs) is not None:
                rows.append(row)
    progress.start("comparing directions", sum(row.nbytes for row in rows))
    totals: dict[str, Gram] = {}
    for name, gram in measure_gram(rows, threads=threads, advance=progress.advance).items():
        component = base.family.component_of(name)
        totals[component] = totals[component] + gram if component in totals else gram
    tasks = {name: _tasks(totals[name]) for name in relation.groups if name in totals}
    return Relation(
        relation.a, relation.b, relation.verdict, relation.reason, relation.groups, tasks,
        relation.notes,
    )  # fmt: skip


def _tasks(gram: Gram) -> Tasks:
    """From the products of A, B and C."""
    products = gram.combined([[1, 0, -1], [0, 1, -1], [0, 0, 1]])
    base = float(products[2, 2])
    # differences below the rounding of the sums are none
    a, b = (max(0.0, float(products[i, i])) if products[i, i] > 1e-13 * base else 0.0
            for i in (0, 1))  # fmt: skip
    cosine = float(products[0, 1]) / math.sqrt(a * b) if a and b else math.nan
    root = math.sqrt(base) or math.inf
    return Tasks(max(-1.0, min(1.0, cosine)) if a and b else cosine,
                 math.sqrt(a) / root, math.sqrt(b) / root)  # fmt: skip


# --- an adapter --------------------------------------------------------------------------------


def _judge_adapter(
    path: Path, models: Sequence[_Model], base: _Model | None, relations: Sequence[Relation]
) -> list[Suits]:
    """Whether the adapter suits each model.

    relations  of each model with the base, in order; none without a base
    """
    families, told = _read_adapter(path)
    found = []
    for number, model in enumerate(models):
        relation = relations[number] if base is not None else None
        verdict, reason = _suits(families, told, model, relation)
        found.append(Suits(path, model.path, verdict, reason, families, told))
    return found


def _read_adapter(path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """(the families that it fits, what its metadata and its config say of its base)."""
    from ckptools.adapters.reading import open_adapter

    with open_checkpoint(path) as checkpoint:
        detection = detect(checkpoint, checkpoint.metadata)
        told = {key: checkpoint.metadata[key] for key in _TRAINED_ON if key in checkpoint.metadata}
        config = json_beside(checkpoint.path, PEFT_CONFIG) or {}
    named = config.get("base_model_name_or_path")
    if isinstance(named, str) and named:
        told["base_model_name_or_path"] = named
    if detection.kind == "controlnet":
        return ((detection.variant,) if detection.variant else ()), told
    with open_adapter(path, allow_unknown=True) as adapter:
        return tuple(dict.fromkeys(fit.family for fit in adapter.fits)), told


def _suits(
    families: Sequence[str],
    told: Mapping[str, str],
    model: _Model,
    relation: Relation | None,
) -> tuple[Verdict, str]:
    own = model.detection.family
    if families and own is not None and own not in families:
        return "other-family", f"it is for {' or '.join(families)}, the model is {own}"
    if _was_trained_on(told, model.path):
        return "same", "it was trained on this very file, by the hash in its metadata"
    if relation is not None:
        return relation.verdict, f"its base and the model: {relation.reason}"
    fits = f"it fits {own}" if families and own else "its family is not told"
    said = told.get("ss_sd_model_name") or told.get("base_model_name_or_path")
    base = f" (it was trained on {said!r})" if said else ""
    return "unknown", f"{fits}; give --base, the model it was trained on{base}, to measure"


def _was_trained_on(told: Mapping[str, str], model: Path) -> bool:
    """Whether the metadata holds this model's sha256.

    `ss_sd_model_hash` does not count: it is AutoV1, which fine-tunes often share with their base,
    since it sees 64 KiB only. Source: kohya-ss/sd-scripts, `train_network.py`.
    """
    wanted = told.get("ss_new_sd_model_hash", "").lower()
    if not wanted or not model.is_file():
        return False
    return hash_source(model).files[0].sha256 == wanted
