"""Compares two models: structure, then values, then what the change is.

Tensors are matched by the family's usual names, so layouts do not matter. Must not know how
anything is shown. Nothing here needs torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ckptools.checkpoint import Checkpoint
from ckptools.errors import InputError, counted
from ckptools.family import Detection, Family, detect, family_of
from ckptools.hubref import is_local
from ckptools.quantised import quantised_in
from ckptools.sources import Opener, open_checkpoint
from ckptools.tensors import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckptools.measure import Gram, Pair, Row

_SPELT = {"unet": "the UNet", "vae": "the VAE", "text_encoder": "the text encoder"}
_LARGEST = 1 << 19  # elements of a sampled matrix: 640 x 768; larger ones take seconds
_FIRST = 3  # where none of the first is of low rank, no more are looked at
_SAMPLE = 12  # tensors of the low-rank test
_SKETCH = 144  # columns of its random projection: ranks up to about 128 are seen
_EPSILON = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24, "F64": 2.0**-53}
_KINDS = (
    ("attention q", r"\.to_q\.|\.q_proj\.|\.q\.(?:weight|bias)$"),
    ("attention k", r"\.to_k\.|\.k_proj\.|\.k\.(?:weight|bias)$"),
    ("attention v", r"\.to_v\.|\.v_proj\.|\.v\.(?:weight|bias)$"),
    ("attention out", r"\.to_out\.|\.attn(?:_1)?\.(?:out_proj|proj_out)|self_attn\.out_proj"),
    ("attention qkv", r"\.in_proj_"),
    ("norm", r"norm|\.ln_|(?:in|out)_layers\.0\.|diffusion_model\.out\.0\."),
    ("ff", r"\.ff\.|\.mlp\."),
    ("projection", r"\.proj_(?:in|out)\.|_projection"),
    ("time", r"time_embed|emb_layers|label_emb"),
    ("embedding", r"embedding"),
    (
        "conv",
        r"conv|(?:in|out)_layers\.|skip_connection|\.op\.|shortcut|input_blocks\.0\.|\.out\.2",
    ),
)
_KIND_OF = [(kind, re.compile(pattern)) for kind, pattern in _KINDS]
KINDS = (*(kind for kind, _ in _KINDS), "other")


class Progress(Protocol):
    """Who wants to know how far it is."""

    def start(self, stage: str, total_bytes: int) -> None:
        """A stage begins."""

    def advance(self, nbytes: int) -> None:
        """So many bytes more."""


@dataclass(frozen=True)
class Model:
    """One side: its checkpoint, what it is, and usual name -> the file's own name."""

    checkpoint: Checkpoint
    detection: Detection
    names: Mapping[str, str]

    def spec(self, name: str) -> TensorSpec:
        """What the tensor of this usual name is."""
        return self.checkpoint[self.names[name]]

    @property
    def layout(self) -> str:
        """As the file has it: "diffusers" where a folder is seen under other names."""
        return self.checkpoint.layout or self.detection.layout or ""


@dataclass(frozen=True)
class LowRank:
    """What the low-rank test of A - B found.

    sampled   matrices that were looked at, of `changed` changed ones
    low       those whose change is a matrix of low rank and storage noise
    rank      the median rank of these; kinds: where they lie
    """

    changed: int
    sampled: int
    low: int
    rank: int
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """B as the nearest combination of A and other models.

    coefficients  of A and the others, in order; their sum is not forced to be 1
    residual      |B - fit| / |B - A|: relative to the difference, not to the weights
    """

    coefficients: tuple[float, ...]
    residual: float


@dataclass(frozen=True)
class Difference:
    """All that a comparison found; names are the family's usual ones.

    reshaped   (name, A, B) of unequal shapes; those in `pairs` were compared in their common part
    dtypes     (dtype in A, in B) -> number of tensors, where they differ
    metadata   (key, in A or None, in B or None) where they differ
    pairs      per tensor; empty for a comparison of structure
    groups     "all", components, blocks
    fits       group -> fit, with `--explain-by`
    fit_labels  what the fits call their models, in the order of the coefficients -> its path
    left_out   tensors that no fit covers, because some model lacks them
    """

    a: Model
    b: Model
    family: Family
    has_values: bool
    tensors: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: tuple[tuple[str, TensorSpec, TensorSpec], ...]
    dtypes: Mapping[tuple[str, str], int]
    metadata: tuple[tuple[str, str | None, str | None], ...]
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    groups: Mapping[str, Pair] = field(default_factory=dict)
    low_rank: LowRank | None = None
    fits: Mapping[str, Fit] = field(default_factory=dict)
    fit_labels: Mapping[str, Path] = field(default_factory=dict)
    left_out: int = 0
    explanation: str = ""
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> int:
        """How many tensors differ in value, or cannot be compared."""
        found = {name for name, pair in self.pairs.items() if pair.changed}
        return len(found | {name for name, _, _ in self.reshaped})

    @property
    def same(self) -> bool:
        """Whether tensors, shapes and (unless structure alone was asked for) values are equal.

        Layout and metadata may differ; dtypes too, where the numbers are equal.
        """
        structure = not (self.only_a or self.only_b or self.reshaped)
        return structure and not self.changed and (self.has_values or not self.dtypes)


def kind_of(name: str) -> str:
    """What a tensor is for, one of `KINDS`, told from its usual name."""
    return next((kind for kind, pattern in _KIND_OF if pattern.search(name)), "other")


def compare(
    a: Path,
    b: Path,
    *,
    structure: bool = False,
    explain_by: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Difference:
    """Compare two models, from headers alone where `structure` is set.

    explain_by  models by which, with A, B is to be explained as a linear combination
    Raises `InputError` and its kin for files that cannot be read.
    """
    with ExitStack() as stack:
        opener = _opener((a, b, *explain_by), structure=structure, progress=progress)
        models = [_open(stack, opener(path)) for path in (a, b, *explain_by)]
        found = _structure(models[0], models[1], has_values=not structure)
        if structure:
            return replace(found, explanation=_structure_in_words(found))
        found = _values(found, progress)
        notes = _notes(found)
        found = replace(found, low_rank=_low_rank(found))
        if explain_by:
            found = _fitted(found, models[2:], progress)
        for model in models:
            model.checkpoint.check_unchanged()
        headline, more = _in_words(found)
        return replace(found, explanation=headline, notes=(*more, *notes))


def _opener(paths: Sequence[Path], *, structure: bool, progress: Progress | None) -> Opener:
    """What opens these paths; for structure alone, models on the Hub by their headers."""
    if all(map(is_local, paths)):
        return open_checkpoint
    from ckptools.hub.remote import Hub  # loads the Hub's client

    hub = Hub(progress)
    return hub.look if structure else hub.open_whole


def _open(stack: ExitStack, checkpoint: Checkpoint) -> Model:
    stack.enter_context(checkpoint)
    detection = detect(checkpoint, checkpoint.metadata)
    usual = family_of(detection).canonical_name
    names: dict[str, str] = {}
    for name in checkpoint:
        names.setdefault(usual(name), name)
    for name in checkpoint:  # two spellings of one name: both are kept, each as it is
        if names[usual(name)] != name:
            names[name] = name
    return Model(checkpoint, detection, names)


def _structure(a: Model, b: Model, *, has_values: bool) -> Difference:
    shared = [name for name in a.names if name in b.names]
    specs = {name: (a.spec(name), b.spec(name)) for name in shared}
    keys = sorted({*a.checkpoint.metadata, *b.checkpoint.metadata})
    texts = [(key, a.checkpoint.metadata.get(key), b.checkpoint.metadata.get(key)) for key in keys]
    family = family_of(a.detection)
    return Difference(
        a=a,
        b=b,
        family=family if family.components else family_of(b.detection),
        has_values=has_values,
        tensors=len(shared),
        only_a=tuple(sorted(a.names.keys() - b.names.keys())),
        only_b=tuple(sorted(b.names.keys() - a.names.keys())),
        reshaped=tuple((n, x, y) for n, (x, y) in specs.items() if _flat(x) != _flat(y)),
        dtypes=Counter((x.dtype, y.dtype) for x, y in specs.values() if x.dtype != y.dtype),
        metadata=tuple(text for text in texts if text[1] != text[2]),
    )


def _flat(spec: TensorSpec) -> tuple[int, ...]:
    """The shape without dims of one: a linear layer may be kept as a convolution."""
    return tuple(size for size in spec.shape if size != 1)


# --- values ------------------------------------------------------------------------------------


def _row(found: Difference, name: str) -> Row:
    from ckptools.measure import Row

    sides = (found.a, found.b)
    return Row(name, tuple((side.checkpoint, side.names[name]) for side in sides))


def _values(found: Difference, progress: Progress | None) -> Difference:
    from ckptools.measure import common_shape, measure_pairs

    names = [name for name in found.a.names if name in found.b.names]
    rows = [_row(found, name) for name in names]
    rows = [row for row in rows if common_shape(row.specs) is not None]
    pairs = measure_pairs(rows, advance=_advance(progress, "compare", rows))
    whole = {row.key for row in rows if not all(spec.is_float for spec in row.specs)}
    return replace(found, pairs=pairs, groups=_grouped(found.family, pairs, whole))


def _advance(progress: Progress | None, stage: str, rows: Sequence[Row]) -> Callable[[int], None]:
    if progress is None:
        return lambda nbytes: None
    progress.start(stage, sum(row.nbytes for row in rows))
    return progress.advance


def groups_of(family: Family, name: str) -> Iterator[str]:
    """The groups a tensor counts in: all, its component, its block if it has one."""
    yield "all"
    yield family.component_of(name)
    if block := family.block_of(name):
        yield block


def _grouped(family: Family, pairs: Mapping[str, Pair], whole: set[str]) -> dict[str, Pair]:
    """Sums by group. Integers, `whole`, count among what changed; the norms are of the weights.

    Position ids, 0 to 76, would outweigh a text encoder. A group of integers alone keeps theirs.
    """
    from ckptools.measure import Pair

    members: dict[str, list[str]] = {}
    for name in pairs:
        for group in groups_of(family, name):
            members.setdefault(group, []).append(name)
    weights = {**pairs, **{name: pairs[name].without_norms for name in whole}}
    groups = {}
    for group in ("all", *family.components, "other", *family.blocks):
        if names := members.get(group):
            known = pairs if whole.issuperset(names) else weights
            groups[group] = Pair.total(known[name] for name in names)
    return groups


# --- what the change is ------------------------------------------------------------------------


def _structure_in_words(found: Difference) -> str:
    if found.same:
        return "same structure; values were not read"
    parts = [
        (len(found.only_a), "only in A"),
        (len(found.only_b), "only in B"),
        (len(found.reshaped), "of another shape"),
        (sum(found.dtypes.values()), "of another dtype"),
    ]
    told = ", ".join(f"{count:,} {words}" for count, words in parts if count)
    return f"structure differs: tensors {told}"


def _in_words(found: Difference) -> tuple[str, list[str]]:
    """The headline, and what else there is to say."""
    structure = _missing_in_words(found)
    changed = {name for name, pair in found.pairs.items() if pair.changed}
    if not found.pairs:
        return "nothing in common", structure
    if not changed:
        headline = _unchanged_in_words(found)
        if structure:
            headline = "what both have is equal: " + headline if headline != "identical" else ""
            return "; ".join(filter(None, [headline, *structure])), []
        return headline, []
    if rounded := _rounded(found, changed):
        return rounded, structure
    if ema := _ema(found):
        return ema, structure
    components = [
        name
        for name in (*found.family.components, "other")
        if name in found.groups and found.groups[name].changed
    ]
    present = [name for name in (*found.family.components, "other") if name in found.groups]
    more = list(structure)
    headline = f"differs in {_listed(components)}"
    if len(components) < len(present):
        headline = f"only {_listed(components)} differ{'s' if len(components) == 1 else ''}"
    rank = found.low_rank
    if rank and rank.low >= 0.9 * rank.sampled:
        looked = f"{rank.low} of {rank.sampled} sampled matrices, {rank.changed:,} changed"
        headline += f", as by a LoRA of rank ≈ {rank.rank} on {_listed(rank.kinds)} ({looked})"
    return headline, more


def _listed(words: Iterable[str]) -> str:
    shown = [_SPELT.get(word, word.replace("_", " ")) for word in words]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


def _unchanged_in_words(found: Difference) -> str:
    same_bits = all(pair.same_bits for pair in found.pairs.values())
    others = []
    renamed = any(found.a.names[name] != found.b.names[name] for name in found.pairs)
    layouts = (found.a.layout, found.b.layout)
    if renamed or layouts[0] != layouts[1]:
        others.append(f"layout ({' and '.join(filter(None, layouts)) or 'names'})")
    if found.dtypes:
        others.append("dtype (" + ", ".join(f"{x} and {y}" for x, y in found.dtypes) + ")")
    if others:
        return f"same weights, other {' and '.join(others)}"
    if not same_bits and not found.reshaped:
        return "same weights; only the signs of zeros differ"
    return "identical weights; metadata differs" if found.metadata else "identical"


def _missing_in_words(found: Difference) -> list[str]:
    notes = []
    for side, other, names in (("A", "B", found.only_a), ("B", "A", found.only_b)):
        ema = [name for name in names if name.startswith("model_ema.")]
        if ema:
            copy = counted(len(ema), "tensor")
            notes.append(f"{side} has an EMA copy of the UNet ({copy}), {other} not")
        if rest := len(names) - len(ema):
            notes.append(f"{counted(rest, 'tensor', 'is')} only in {side}")
    for name, x, y in found.reshaped:
        if name in found.family.input_tensors and len(x.shape) > 1:
            variants = (found.a.detection.variant, found.b.detection.variant)
            notes.append(
                f"A ({variants[0]}) takes {x.shape[1]} input channels, "
                f"B ({variants[1]}) {y.shape[1]}; the common ones were compared"
            )
    others = [name for name, _, _ in found.reshaped if name not in found.family.input_tensors]
    if others:
        notes.append(f"{counted(len(others), 'tensor', 'has')} another shape")
    return notes


def _notes(found: Difference) -> list[str]:
    notes = []
    for side, model in (("A", found.a), ("B", found.b)):
        stored = quantised_in(model.checkpoint)
        if stored and found.groups:
            how = " and ".join(sorted(set(stored.values())))
            notes.append(f"{side} holds {how}: its codes were compared, not the weights they mean")
    total = found.groups.get("all")
    if total is not None and total.nonfinite:
        notes.append(f"{total.nonfinite:,} values are NaN or Inf; norms leave them out")
    return notes


def _rounded(found: Difference, changed: set[str]) -> str:
    """Whether one model is the other rounded to a narrower dtype; proven by rounding it."""
    from ckptools.measure import measure_rounding

    rows = [_row(found, name) for name in sorted(changed)]
    if any(row.specs[0].dtype == row.specs[1].dtype for row in rows):
        return ""
    for one, two, order in (("A", "B", 1), ("B", "A", -1)):
        turned = [replace(row, reads=row.reads[::order]) for row in rows]
        if all(measure_rounding(turned).values()):
            narrow = sorted({row.specs[1].dtype for row in turned})
            return f"same weights, other dtype: {two} is {one} rounded to {_listed(narrow)}"
    return ""


def _ema(found: Difference) -> str:
    """Whether one model's UNet is the EMA copy that the other carries."""
    from ckptools.measure import Row, measure_pairs

    unet = [name for name in found.pairs if name.startswith("model.diffusion_model.")]
    for one, two, holder, other in (
        ("B", "A", found.a, found.b),
        ("A", "B", found.b, found.a),
    ):
        copies = {name: "model_ema." + name[len("model.") :].replace(".", "") for name in unet}
        if not unet or any(copy not in holder.names for copy in copies.values()):
            continue
        rows = [
            Row(
                name,
                (
                    (holder.checkpoint, holder.names[copies[name]]),
                    (other.checkpoint, other.names[name]),
                ),
            )
            for name in unet
        ]
        if not any(pair.changed for pair in measure_pairs(rows).values()):
            return f"the UNet of {one} is the EMA copy in {two}"
    return ""


def _low_rank(found: Difference) -> LowRank | None:
    """Look at a seeded sample of changed matrices; None where there is none."""
    import numpy as np

    reshaped = {name for name, _, _ in found.reshaped}
    changed = sorted(
        name
        for name, pair in found.pairs.items()
        if pair.changed
        and not pair.nonfinite
        and name not in reshaped
        and len(spec := found.a.spec(name).shape) >= 2
        and min(spec[0], math.prod(spec[1:])) >= 8
        and found.a.spec(name).is_float
    )
    looked = [name for name in changed if found.a.spec(name).numel <= _LARGEST]
    if not looked:
        return None
    random = np.random.default_rng(0)
    chosen = random.permutation(len(looked))[:_SAMPLE]
    ranks: list[int] = []
    sampled = 0
    for number in chosen:
        rank = _rank(found, looked[number])
        sampled += 1
        if rank is not None:
            ranks.append(rank)
        if sampled == _FIRST and not ranks:
            break
    kinds = dict.fromkeys("attention" if (k := kind_of(n)).startswith("attention") else k
                          for n in changed)  # fmt: skip
    middle = sorted(ranks)[len(ranks) // 2] if ranks else 0
    return LowRank(len(changed), sampled, len(ranks), middle, tuple(kinds))


def _rank(found: Difference, name: str) -> int | None:
    """The rank of A - B beyond what rounding to the stored dtypes adds; None if it is not low.

    A random projection finds the leading singular values. Noise of deviation s in an (m, n) matrix
    has singular values up to s * (sqrt(m) + sqrt(n)).
    Source: Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.1; for the bound Davidson
    and Szarek 2001, theorem II.13.
    """
    import numpy as np

    from ckptools.codec import decode

    matrices = []
    for side in (found.a, found.b):
        spec = side.spec(name)
        data = np.frombuffer(side.checkpoint.read(side.names[name]), np.uint8)
        values = decode(data, spec.dtype, np.empty(spec.numel))
        matrices.append(values.reshape(spec.shape[0], -1))
    delta = matrices[0] - matrices[1].reshape(matrices[0].shape)
    rows, columns = delta.shape
    variance = (
        sum(
            float((side**2).sum()) * _EPSILON.get(model.spec(name).dtype, 0.1) ** 2 / 3
            for side, model in zip(matrices, (found.a, found.b), strict=True)
        )
        / delta.size
    )
    sketch = min(_SKETCH, *delta.shape)
    random = np.random.default_rng(1)
    basis, _ = np.linalg.qr(delta @ random.standard_normal((columns, sketch)))
    values = np.linalg.svd(basis.T @ delta, compute_uv=False)
    total = float((delta**2).sum())
    bound = max(math.sqrt(variance) * (math.sqrt(rows) + math.sqrt(columns)), 1e-6 * values[0])
    rank = int((values > bound).sum())
    rest = total - float((values[:rank] ** 2).sum())
    is_low = 0 < rank <= min(rows, columns) // 4
    return rank if is_low and rest <= 2 * variance * delta.size + 1e-4 * total else None


# --- explained by other models -----------------------------------------------------------------


def _fitted(found: Difference, others: Sequence[Model], progress: Progress | None) -> Difference:
    from ckptools.measure import Row, measure_gram

    models = [found.b, found.a, *others]
    rows, left_out = [], 0
    for name in found.pairs:
        if not all(name in model.names for model in models):
            left_out += 1
            continue
        specs = [model.spec(name) for model in models]
        if not all(spec.is_float for spec in specs) or len({_flat(spec) for spec in specs}) > 1:
            left_out += any(spec.is_float for spec in specs)
            continue
        rows.append(Row(name, tuple((model.checkpoint, model.names[name]) for model in models)))
    if not rows:
        raise InputError(
            "the models have no tensors in common", where="--explain-by",
            fix="give models of the same family",
        )  # fmt: skip
    grams = measure_gram(rows, advance=_advance(progress, "fit", rows))
    groups: dict[str, Gram] = {}
    for name, gram in grams.items():
        for group in groups_of(found.family, name):
            groups[group] = groups[group] + gram if group in groups else gram
    fits = {group: fit for group in found.groups if group in groups
            if (fit := fit_models(groups[group].matrix)) is not None}  # fmt: skip
    labels = ["A", *(chr(ord("C") + number) for number in range(len(others)))]
    paths = [model.checkpoint.path for model in (found.a, *others)]
    named = dict(zip(labels, paths, strict=True))
    return replace(found, fits=fits, fit_labels=named, left_out=left_out)


def fit_models(matrix: NDArray[Any]) -> Fit | None:
    """The least-squares fit of model 0 by models 1 (A), 2, …; None where B is A.

    matrix  their Gram matrix, fp64. The unknowns are steps from A to the others and a scale of A,
            so that models near one another do not spoil each other's digits.
    """
    import numpy as np

    size = len(matrix)
    target = np.eye(size)[0] - np.eye(size)[1]
    steps = [np.eye(size)[1], *(np.eye(size)[k] - np.eye(size)[1] for k in range(2, size))]
    spread = float(target @ matrix @ target)
    scale_of_a = float(matrix[1, 1])
    if spread <= 1e-24 * scale_of_a or spread <= 0:
        return None
    basis = np.array(steps)
    gram = basis @ matrix @ basis.T
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    found, *_ = np.linalg.lstsq(gram / np.outer(scale, scale),
                                basis @ matrix @ target / scale, rcond=1e-11)  # fmt: skip
    found = found / scale
    rest = target - found @ basis
    residual = math.sqrt(max(float(rest @ matrix @ rest), 0.0) / spread)
    coefficients = found @ basis + np.eye(size)[1]
    return Fit(tuple(float(value) for value in coefficients[1:]), residual)


def fit_in_words(fit: Fit, labels: Sequence[str]) -> str:
    """A fit as a formula: "0.7·A + 0.3·C", or "A + 0.7·(C - D)"."""
    values = fit.coefficients
    if len(values) == 3 and abs(values[0] - 1) < 0.005 and abs(values[1] + values[2]) < 0.005:
        return f"{labels[0]} + {values[1]:.4g}·({labels[1]} - {labels[2]})"
    text = ""
    for value, label in zip(values, labels, strict=True):
        if abs(value) < 5e-5:
            continue
        sign = (" - " if value < 0 else " + ") if text else ("-" if value < 0 else "")
        text += f"{sign}{abs(value):.4g}·{label}"
    return text or "0"
