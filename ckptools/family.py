"""Model families: what a file is, and what its tensors are called. Reads no tensor values.

Everything known about a family stands in `families/<id>.yaml`; this module holds the language of
those files and no model's name. A new family is a new file.

    id, title, kind   kind: one of `KINDS`
    extends           another file whose top-level keys hold where this one is silent
    marks             facts that must all hold for a file to be of this family. The first says
                      whether a file is near at all; the first that fails is the reason given
    diffusers         the marks of the same model in diffusers' names: these or `marks` must hold
    notes             marks that decide nothing and are only told
    variants          id → architecture (ModelSpec 1.0.1), resolution, marks; the first that holds
    variant_needed    no variant, no match
    layouts           id → marks; the first that holds
    components        name → prefixes of tensor names; the longest prefix decides, else "other"
    renames           other spellings of a prefix → the spelling used everywhere else, in marks too
    blocks            order, of (prefix → block, first match), compat (name → rules tried before)
    protected         patterns of tensors that are carried, whatever a formula says
    input_tensors     the tensors whose dim 1 counts the input channels
    copied            of what is a copy of a part of another model: prefixes of its tensors → those
                      of the tensors that they began as; `of` in a variant: that model's family
    prediction        markers (tensor → prediction), usual (where there is no marker)

A mark asks one thing of the tensor names and shapes, and says it in words ("{}" is what was found):

    any: PATTERNS       at least one such tensor; at_least and at_most bound their number;
                        instead: {PATTERN: words} gives a better reason where that pattern is found
    none: PATTERNS      no such tensor
    each: PATTERNS      all such tensors (one at least) agree: `ndim`, or `dim` with a `size` (or a
                        list) and/or `width_of` (the sum, over these patterns, of the last dim of
                        the tensors found). A true size needs nothing else; a width of its own must
                        fit other tensors of the file: that is how narrow relatives are recognised.
    numbered: PREFIX#.  the numbers at "#" run up to `count` - 1
    most: PATTERNS      more than half of all tensors are such

In a pattern "*" is any text; in a prefix "#" is a number of up to four digits.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cache, cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast, get_args

from ckptools.datafile import check_keys, items, mapping, texts
from ckptools.errors import InputError, nearest
from ckptools.tensors import TensorSpec

Ask = Literal["any", "none", "each", "numbered", "most"]

# In the order they are tried: adapters may repeat any model's names, parts lack what wholes have.
KINDS = (
    *("lora", "embedding", "hypernetwork", "ip_adapter", "t2i_adapter", "motion_module"),
    *("checkpoint", "controlnet", "vae", "text_encoder", "language_model"),
)
_KINDS_WITHOUT_FAMILY = frozenset({"lora", "embedding"})
_MOST_REJECTED = 3
_NO_METADATA: Mapping[str, str] = MappingProxyType({})
_FOLDER = Path(__file__).parent / "families"


@dataclass(frozen=True)
class Mark:
    """One fact a file must show; the fields are those of the language above."""

    ask: Ask
    patterns: tuple[str, ...]
    says: str
    at_least: int = 1
    at_most: int = 1_000_000_000
    instead: tuple[tuple[str, str], ...] = ()
    ndim: int | None = None
    dim: int = 0
    sizes: tuple[int, ...] = ()
    width_of: tuple[str, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class Variant:
    """A relative with the same tensors: inpainting, depth.

    architecture      ModelSpec id, or ""
    resolution        "512x512", or ""
    usual_prediction  where no marker says otherwise; None: as the family has it
    predicts          prediction → (architecture, resolution) where it changes them
    of                the family of the model that it is a copy of a part of, or ""
    """

    id: str
    marks: tuple[Mark, ...]
    architecture: str = ""
    resolution: str = ""
    usual_prediction: str | None = None
    predicts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    of: str = ""


@dataclass(frozen=True)
class BlockRule:
    """Tensors under `prefix` (which may hold a "#") are in `block` ("IN##"; "" is no block)."""

    prefix: str
    block: str

    @cached_property
    def matches(self) -> Callable[[str], re.Match[str] | None]:
        """Matcher of tensor names; its group 1, if any, is the block's number."""
        return _prefix_regex(self.prefix).match


@dataclass(frozen=True, eq=False)
class Family:
    """One data file. Ask it about single tensor names; ask `detect` about files.

    components  component → prefixes, in the order of the file
    blocks      block names in order: BASE IN00 … OUT11; () where the family has none
    compat      how other tools assign blocks: name → rules tried before the family's own
    protected   patterns of tensors that are carried from the base, never merged
    copied      prefixes of tensors that are copies of another model's → that model's prefixes
    """

    id: str
    title: str
    kind: str
    marks: tuple[Mark, ...] = ()
    diffusers_marks: tuple[Mark, ...] = ()
    notes: tuple[Mark, ...] = ()
    variants: Mapping[str, Variant] = field(default_factory=dict)
    variant_needed: bool = False
    layouts: Mapping[str, tuple[Mark, ...]] = field(default_factory=dict)
    components: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    block_rules: tuple[BlockRule, ...] = ()
    compat: Mapping[str, tuple[BlockRule, ...]] = field(default_factory=dict)
    protected: tuple[str, ...] = ()
    input_tensors: tuple[str, ...] = ()
    copied: Mapping[str, str] = field(default_factory=dict)
    usual_prediction: str | None = None
    prediction_markers: Mapping[str, str] = field(default_factory=dict)

    def component_of(self, name: str) -> str:
        """The one component of a tensor, "other" where no prefix fits."""
        for prefix, component in self._prefixes:
            if name.startswith(prefix):
                return component
        return "other"

    def block_of(self, name: str, compat: str = "") -> str:
        """The merge block of a tensor, such as "IN04"; "" where it has none.

        compat: a key of `self.compat` assigns time_embed, label_emb, out and the VAE as that tool
        does. An unknown one is an InputError.
        """
        for rule in self._rules(compat):
            match = rule.matches(name)
            if match:
                block = rule.block
                if "#" in block:
                    block = block.replace("##", match[1].zfill(2))
                return block if block in self._block_set else ""
        return ""

    def is_protected(self, name: str) -> bool:
        """Whether a tensor is carried from the base whatever the formula says."""
        return self._protected.match(name) is not None

    def canonical_name(self, name: str) -> str:
        """The name under which the same tensor goes elsewhere; `name` where it has no other."""
        for other, usual in self.renames.items():
            if name.startswith(other):
                return usual + name[len(other) :]
        return name

    def copy_name(self, name: str) -> str | None:
        """The name here of a copy of another model's tensor; None where there is no copy."""
        for own, theirs in self.copied.items():
            if name.startswith(theirs):
                return own + name[len(theirs) :]
        return None

    def is_copy(self, name: str) -> bool:
        """Whether a tensor began as a copy of another model's."""
        return name.startswith(tuple(self.copied))

    def architecture(self, variant: str | None, prediction: str | None = None) -> str:
        """The ModelSpec 1.0.1 architecture id: "stable-diffusion-v1-inpainting"; "" if none.

        variant None means the first variant. A prediction counts only where the id depends on it
        (stable-diffusion-v2-512, stable-diffusion-v2-768-v).
        """
        return self._architecture_and_resolution(variant, prediction)[0]

    def resolution(self, variant: str | None, prediction: str | None = None) -> str:
        """The usual picture size, "width x height" as ModelSpec has it: "512x512"; "" if none."""
        return self._architecture_and_resolution(variant, prediction)[1]

    def _architecture_and_resolution(
        self, variant: str | None, prediction: str | None
    ) -> tuple[str, str]:
        if not self.variants:
            return ("", "")
        if variant is not None and variant not in self.variants:
            raise InputError(
                f"{self.id} has no variant {variant!r}", fix=nearest(variant, self.variants)
            )
        chosen = self.variants[variant] if variant else next(iter(self.variants.values()))
        usual = (chosen.architecture, chosen.resolution)
        return chosen.predicts.get(prediction or "", usual)

    @cached_property
    def _prefixes(self) -> tuple[tuple[str, str], ...]:
        pairs = [(p, component) for component, ps in self.components.items() for p in ps]
        return tuple(sorted(pairs, key=lambda pair: -len(pair[0])))

    @cached_property
    def _block_set(self) -> frozenset[str]:
        return frozenset(self.blocks)

    @cached_property
    def _protected(self) -> re.Pattern[str]:
        return re.compile("|".join(map(translate, self.protected)) or r"(?!)")

    def _rules(self, compat: str) -> tuple[BlockRule, ...]:
        if not compat:
            return self.block_rules
        if compat not in self.compat:
            raise InputError(
                f"{self.id} has no block mapping {compat!r}",
                fix=nearest(compat, self.compat) or "leave `compat` out",
            )
        return self._compat_rules[compat]

    @cached_property
    def _compat_rules(self) -> dict[str, tuple[BlockRule, ...]]:
        return {name: (*rules, *self.block_rules) for name, rules in self.compat.items()}


UNKNOWN = Family(id="unknown", title="unknown", kind="unknown", protected=("*position_ids",))


@dataclass(frozen=True)
class Rejection:
    """A family that was near, and the first fact that speaks against it."""

    family: str
    reason: str


@dataclass(frozen=True)
class Detection:
    """What a file is, and why.

    kind        one of `KINDS`, or unknown
    family      key of `load_families()`; None for adapters, embeddings and unknown files
    variant     key of the family's variants; None where the deciding tensor is missing or new
    layout      ldm, diffusers, kohya, peft …; None for unknown files
    prediction  epsilon, v, edm, edm-v; None where neither header nor metadata can tell
    evidence    facts in words, the deciding ones first
    rejected    the nearest other families, nearest first
    """

    kind: str
    family: str | None
    variant: str | None
    layout: str | None
    prediction: str | None
    evidence: tuple[str, ...]
    rejected: tuple[Rejection, ...]


_KIND_WORDS = {
    "lora": "an adapter (LoRA)",
    "embedding": "an embedding",
    "hypernetwork": "a hypernetwork",
    "ip_adapter": "an IP-Adapter",
    "t2i_adapter": "a T2I-Adapter",
    "motion_module": "a motion module",
    "checkpoint": "a whole model",
    "controlnet": "a ControlNet",
    "vae": "a VAE",
    "text_encoder": "a text encoder",
    "language_model": "a language model",
    "unknown": "a file of no known kind",
}


def kind_words(detection: Detection) -> str:
    """The kind of a file as a message names it: "an adapter (LoRA)"."""
    return _KIND_WORDS[detection.kind]


def family_of(detection: Detection) -> Family:
    """The family of a detected file, `UNKNOWN` where it has none."""
    return load_families()[detection.family] if detection.family else UNKNOWN


def detect(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] = _NO_METADATA
) -> Detection:
    """What the file with these tensors is, told from names and shapes alone.

    metadata only tells the prediction where no marker tensor does (modelspec.prediction_type).
    A family is recognised when all of its marks hold; there is no default and no share of names.
    """
    claims = tuple((key, metadata[key]) for key in _CLAIMS if key in metadata)
    return _detect(tuple(specs.items()), claims, tuple(load_families().values()))


_CLAIMS = ("modelspec.prediction_type", "modelspec.architecture")


@lru_cache(maxsize=8)  # models that are merged are often of one layout, and asked about twice
def _detect(
    tensors: tuple[tuple[str, TensorSpec], ...],
    claims: tuple[tuple[str, str], ...],
    families: tuple[Family, ...],
) -> Detection:
    specs, metadata = dict(tensors), dict(claims)
    names = _Names(specs)
    for family in (family for kind in KINDS for family in families if family.kind == kind):
        usual = _usual_names(family, names)
        marks = next((m for m in _mark_sets(family) if _all_hold(m, usual, family.id)), None)
        if marks is None:
            continue
        variant = _variant_of(family, usual)
        if variant is not None or not family.variant_needed:
            return _detection(family, marks, variant, names, metadata, families)
    return Detection(
        kind="unknown",
        family=None,
        variant=None,
        layout=None,
        prediction=None,
        evidence=_groups_in_words(specs),
        rejected=_nearest_rejected(names, UNKNOWN, families),
    )


def _mark_sets(family: Family) -> tuple[tuple[Mark, ...], ...]:
    """The marks by which a family is known: its makers' names, and diffusers'."""
    return (family.marks, family.diffusers_marks) if family.diffusers_marks else (family.marks,)


def _usual_names(family: Family, names: _Names) -> _Names:
    """The names as the family's marks have them; the same object where none is spelt otherwise."""
    if not any(names.has_prefix(other) for other in family.renames):
        return names
    return names.renamed(family)


def _detection(
    family: Family,
    marks: tuple[Mark, ...],
    variant: Variant | None,
    names: _Names,
    metadata: Mapping[str, str],
    families: Iterable[Family],
) -> Detection:
    usual = _usual_names(family, names)
    findings = [_judge(mark, usual, family.id) for mark in marks]
    findings += [_judge(mark, names, family.id) for mark in family.notes]
    evidence = [finding.words for finding in findings if finding.holds and finding.words]
    if variant is not None:
        told = [_judge(mark, usual, family.id).words for mark in variant.marks]
        evidence += [words for words in told if words and words not in evidence]
    elif family.variants:
        evidence.append(_no_variant_in_words(family, usual))
    prediction, why = _prediction_of(family, variant, names, metadata)
    has_family = family.kind not in _KINDS_WITHOUT_FAMILY
    is_diffusers = bool(family.diffusers_marks) and marks is family.diffusers_marks
    return Detection(
        kind=family.kind,
        family=family.id if has_family else None,
        variant=variant.id if variant else None,
        layout="diffusers" if is_diffusers else _layout_of(family, names),
        prediction=prediction,
        evidence=(*evidence, *why),
        rejected=_nearest_rejected(names, family, families) if has_family else (),
    )


def _all_hold(marks: Iterable[Mark], names: _Names, family: str) -> bool:
    return all(_judge(mark, names, family).holds for mark in marks)


def _variant_of(family: Family, names: _Names) -> Variant | None:
    for variant in family.variants.values():
        if _all_hold(variant.marks, names, family.id):
            return variant
    return None


def _no_variant_in_words(family: Family, names: _Names) -> str:
    mark = next(iter(family.variants.values())).marks[0]
    finding = _judge(mark, names, family.id)
    return f"no known variant of {family.id}: {finding.words}"


def _layout_of(family: Family, names: _Names) -> str | None:
    for layout, marks in family.layouts.items():
        if _all_hold(marks, names, family.id):
            return layout
    return None


def _prediction_of(
    family: Family, variant: Variant | None, names: _Names, metadata: Mapping[str, str]
) -> tuple[str | None, tuple[str, ...]]:
    """A marker tensor, else the file's own claim, else what is usual; and the evidence."""
    for marker, prediction in family.prediction_markers.items():
        if names.find(marker):
            return prediction, (f"{marker} marks {prediction} prediction",)
    if not family.prediction_markers and family.usual_prediction is None:
        return None, ()
    claim = metadata.get("modelspec.prediction_type", "")
    if claim in {"epsilon", "v"}:
        return claim, (f"metadata modelspec.prediction_type is {claim}",)
    if metadata.get("modelspec.architecture", "").endswith("-v"):
        return "v", ("metadata modelspec.architecture ends with -v",)
    usual = variant.usual_prediction if variant else None
    usual = usual or family.usual_prediction
    if usual:
        return usual, (f"no marker of another prediction: {usual}, as is usual",)
    return None, ("the header cannot tell epsilon from v prediction",)


def _nearest_rejected(
    names: _Names, found: Family, families: Iterable[Family]
) -> tuple[Rejection, ...]:
    """The families whose first mark finds something, those with the fewest failures first.

    Where a family is found, only others of its kind are worth a word.
    """
    near = []
    for family in families:
        if family is found or family.kind in _KINDS_WITHOUT_FAMILY:
            continue
        if found is not UNKNOWN and family.kind != found.kind:
            continue
        usual = _usual_names(family, names)
        for marks in _mark_sets(family):
            findings = [_judge(mark, usual, family.id) for mark in marks]
            failed = [finding.words for finding in findings if not finding.holds]
            if failed and findings[0].is_positive:
                near.append((len(failed) / len(findings), family.id, failed[0]))
    return _each_once(Rejection(family, why) for _, family, why in sorted(near))[:_MOST_REJECTED]


def _each_once(rejections: Iterable[Rejection]) -> tuple[Rejection, ...]:
    first: dict[str, Rejection] = {}
    for rejection in rejections:
        first.setdefault(rejection.family, rejection)
    return tuple(first.values())


def _groups_in_words(specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """What an unknown file holds: its largest groups of names, by their first two parts."""
    if not specs:
        return ("the file holds no tensors",)
    pairs = Counter(".".join(name.split(".")[:2]) for name in specs)
    groups: Counter[str] = Counter()
    for pair, count in pairs.items():
        groups[pair if count > 1 else pair.partition(".")[0]] += count
    largest = sorted(groups.items(), key=lambda item: (-item[1], item[0]))[:3]
    listed = ", ".join(f"{group} ({count})" for group, count in largest)
    return (f"the marks of no known family hold; {len(specs)} tensors, most of them {listed}",)


@dataclass(frozen=True)
class _Finding:
    """What a mark found. is_positive: something is there, not merely absent."""

    holds: bool
    words: str
    is_positive: bool = False


class _Names:
    """Tensor names, sorted, so that a pattern only meets the names that share its beginning."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs
        self._sorted = sorted(specs)
        self._joined = "\n".join(self._sorted)  # one fast look says that a pattern fits nothing
        self._found: dict[str, list[str]] = {}
        self._usual: dict[tuple[tuple[str, str], ...], _Names] = {}
        self._spans: dict[str, list[str]] = {}

    def find(self, pattern: str) -> list[str]:
        """The names that fit, sorted."""
        if pattern not in self._found:
            self._found[pattern] = self._search(pattern)
        return self._found[pattern]

    def find_any(self, patterns: Iterable[str]) -> list[str]:
        """The names that fit one of the patterns, each once."""
        return list(dict.fromkeys(name for pattern in patterns for name in self.find(pattern)))

    def renamed(self, family: Family) -> _Names:
        """The names as the family calls them; made once for all families that agree."""
        key = tuple(family.renames.items())
        if key not in self._usual:
            usual = family.canonical_name
            self._usual[key] = _Names({usual(name): spec for name, spec in self.specs.items()})
        return self._usual[key]

    def has_prefix(self, prefix: str) -> bool:
        """Whether a name begins so."""
        start = bisect_left(self._sorted, prefix)
        return start < len(self._sorted) and self._sorted[start].startswith(prefix)

    def highest(self, prefix: str) -> int:
        """The highest number at the "#" of the prefix; -1 where there is none."""
        matches = map(_prefix_regex(prefix).match, self._span(prefix.partition("#")[0]))
        return max((int(match[1]) for match in matches if match), default=-1)

    def _search(self, pattern: str) -> list[str]:
        head, star, rest = pattern.partition("*")
        if not star:
            return [pattern] if pattern in self.specs else []
        if not head and max(rest.split("*"), key=len) not in self._joined:
            return []
        span = self._span(head)
        if not rest:
            return span
        tail = rest.rpartition("*")[2]
        shortest = len(head) + len(tail)
        span = [name for name in span if name.endswith(tail) and len(name) >= shortest]
        if "*" not in rest:
            return span
        matches = re.compile(translate(pattern)).match
        return [name for name in span if matches(name)]

    def _span(self, head: str) -> list[str]:
        if head not in self._spans:
            start = bisect_left(self._sorted, head)
            end = bisect_left(self._sorted, head + "\U0010ffff", lo=start)
            self._spans[head] = self._sorted[start:end]
        return self._spans[head]


def _judge(mark: Mark, names: _Names, family: str) -> _Finding:
    return _JUDGES[mark.ask](mark, names, family)


def _judge_any(mark: Mark, names: _Names, family: str) -> _Finding:
    count = len(names.find_any(mark.patterns))
    has = "has " + mark.says.format(count)
    if mark.at_least <= count <= mark.at_most:
        return _Finding(holds=True, words=has, is_positive=True)
    for pattern, words in mark.instead:
        if names.find(pattern):
            return _Finding(holds=False, words=f"has {words}", is_positive=True)
    if not count and "{}" not in mark.says:
        return _Finding(holds=False, words=f"lacks {mark.says}")
    bound = f"at least {mark.at_least}" if count < mark.at_least else f"at most {mark.at_most}"
    return _Finding(holds=False, words=f"{has}; {family} has {bound}", is_positive=count > 0)


def _judge_none(mark: Mark, names: _Names, family: str) -> _Finding:
    if names.find_any(mark.patterns):
        return _Finding(holds=False, words=f"has {mark.says}; {family} has none")
    return _Finding(holds=True, words="")


def _judge_each(mark: Mark, names: _Names, family: str) -> _Finding:
    *subject, verb = mark.says.partition("{}")[0].split()
    shapes = [names.specs[name].shape for name in names.find_any(mark.patterns)]
    if not shapes:
        return _Finding(holds=False, words=f"lacks {' '.join(subject)}")
    found = sorted({_measure(shape, mark) for shape in shapes})
    words = mark.says.format(", ".join(map(str, found)))
    wanted = mark.sizes if mark.ndim is None else (mark.ndim,)
    width = _width(mark, names)
    if len(found) == 1 and found[0] in wanted:
        return _Finding(holds=True, words=words, is_positive=True)
    if found == [width]:
        words += _width_in_words(mark, found[0])
        return _Finding(holds=True, words=words, is_positive=True)
    listed = " or ".join(map(str, wanted or (width,)))
    return _Finding(holds=False, words=f"{words}; {family} {verb} {listed}")


def _measure(shape: tuple[int, ...], mark: Mark) -> int:
    """The number of dims, or the size of the mark's dim: 0 where the tensor has no such dim."""
    if mark.ndim is not None:
        return len(shape)
    return shape[mark.dim] if -len(shape) <= mark.dim < len(shape) else 0


def _width(mark: Mark, names: _Names) -> int | None:
    """The sum of the last dims that `width_of` names; None where it cannot be told."""
    total = 0
    for pattern in mark.width_of:
        widths = {names.specs[name].shape[-1:] for name in names.find(pattern)}
        if len(widths) != 1 or () in widths:
            return None
        total += widths.pop()[0]
    return total or None


def _width_in_words(mark: Mark, width: int) -> str:
    source = " + ".join(pattern.partition("*")[0].rstrip(".") for pattern in mark.width_of)
    if not mark.sizes:
        return f", as wide as {source}"
    word = "reduced" if width < mark.sizes[0] else "another"
    return f" ({word} width: {width} instead of {mark.sizes[0]}, as wide as {source})"


def _judge_numbered(mark: Mark, names: _Names, family: str) -> _Finding:
    count = max(names.highest(prefix) for prefix in mark.patterns) + 1
    words = mark.says.format(count)
    if count == mark.count:
        return _Finding(holds=True, words=words, is_positive=True)
    return _Finding(holds=False, words=f"{words}; {family} has {mark.count}")


def _judge_most(mark: Mark, names: _Names, family: str) -> _Finding:
    count, total = len(names.find_any(mark.patterns)), len(names.specs)
    words = f"{count} of {total} tensors are {mark.says}"
    if 2 * count > total:
        return _Finding(holds=True, words=words, is_positive=True)
    return _Finding(holds=False, words=f"{words}; {family} has more than half")


_JUDGES: Mapping[str, Callable[[Mark, _Names, str], _Finding]] = MappingProxyType(
    {
        "any": _judge_any,
        "none": _judge_none,
        "each": _judge_each,
        "numbered": _judge_numbered,
        "most": _judge_most,
    }
)


@cache
def _prefix_regex(prefix: str) -> re.Pattern[str]:
    head, mark, tail = prefix.partition("#")
    number = r"(\d{1,4})" if mark else ""
    return re.compile(re.escape(head) + number + re.escape(tail))


# --- reading the data files ---------------------------------------------------------------------


@cache
def load_families() -> Mapping[str, Family]:
    """Every family by its id, read once from the package's data files."""
    return read_families(_FOLDER)


def read_families(folder: Path) -> Mapping[str, Family]:
    """The families of a folder of `*.yaml` files, by id, sorted.

    A file that breaks the language is an InputError naming file and key.
    """
    raw = {path.stem: _read_yaml(path) for path in sorted(folder.glob("*.yaml"))}
    families: dict[str, Family] = {}
    for stem, data in raw.items():
        if stem.startswith("_"):
            continue
        try:
            family = _family(_with_base(raw, data))
        except (KeyError, TypeError, ValueError) as exc:
            raise InputError(f"not a family: {exc}", where=f"{stem}.yaml") from exc
        families[family.id] = family
    return MappingProxyType(families)


def _with_base(raw: Mapping[str, dict[str, object]], data: dict[str, object]) -> dict[str, object]:
    if "extends" not in data:
        return data
    return {**_with_base(raw, raw[str(data["extends"])]), **data}


def _read_yaml(path: Path) -> dict[str, object]:
    import yaml  # only who asks for families pays for it

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except yaml.YAMLError as exc:
        raise InputError(f"not YAML: {exc}", where=path.name) from exc
    if not isinstance(data, dict):
        raise InputError("not a mapping", where=path.name)
    return data


_FAMILY_KEYS = (
    *("extends", "id", "title", "kind", "marks", "diffusers", "notes"),
    *("variants", "variant_needed", "layouts"),
    *("components", "renames", "blocks", "protected", "input_tensors", "copied", "prediction"),
)


def _family(data: dict[str, object]) -> Family:
    check_keys(data, _FAMILY_KEYS)
    kind = str(data["kind"])
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}; {nearest(kind, KINDS)}")
    blocks = mapping(data.get("blocks"))
    prediction = mapping(data.get("prediction"))
    variants = mapping(data.get("variants"))
    compat = mapping(blocks.get("compat"))
    layouts = mapping(data.get("layouts"))
    components = mapping(data.get("components"))
    return Family(
        id=str(data["id"]),
        title=str(data["title"]),
        kind=kind,
        marks=_marks(data["marks"]),
        diffusers_marks=_marks(data.get("diffusers")),
        notes=_marks(data.get("notes")),
        variants=MappingProxyType({key: _variant(key, variants[key]) for key in variants}),
        variant_needed=data.get("variant_needed") is True,
        layouts=MappingProxyType({key: _marks(layouts[key]) for key in layouts}),
        components=MappingProxyType({key: texts(components[key]) for key in components}),
        renames=MappingProxyType(_text_mapping(data.get("renames"))),
        blocks=expand_blocks(str(blocks.get("order", ""))),
        block_rules=_block_rules(blocks.get("of")),
        compat=MappingProxyType({key: _block_rules(compat[key]) for key in compat}),
        protected=texts(data.get("protected")),
        input_tensors=texts(data.get("input_tensors")),
        copied=MappingProxyType(_text_mapping(data.get("copied"))),
        usual_prediction=_text_or_none(prediction.get("usual")),
        prediction_markers=MappingProxyType(_text_mapping(prediction.get("markers"))),
    )


def expand_blocks(text: str) -> tuple[str, ...]:
    """Block names of a text such as "BASE IN00-IN11 M00".

    >>> expand_blocks("BASE IN00-IN02")
    ('BASE', 'IN00', 'IN01', 'IN02')
    """
    names: list[str] = []
    for word in text.split():
        first, dash, last = word.partition("-")
        letters = first.rstrip("0123456789")
        if not dash:
            names.append(word)
            continue
        span = range(int(first[len(letters) :]), int(last[len(letters) :]) + 1)
        names += [f"{letters}{number:02d}" for number in span]
    return tuple(names)


_VARIANT_KEYS = ("architecture", "resolution", "marks", "usual_prediction", "predicts", "of")


def _variant(variant_id: str, data: object) -> Variant:
    fields = mapping(data)
    check_keys(fields, _VARIANT_KEYS)
    predicts = {
        prediction: (str(mapping(other)["architecture"]), str(mapping(other)["resolution"]))
        for prediction, other in mapping(fields.get("predicts")).items()
    }
    return Variant(
        id=variant_id,
        marks=_marks(fields["marks"]),
        architecture=str(fields.get("architecture", "")),
        resolution=str(fields.get("resolution", "")),
        usual_prediction=_text_or_none(fields.get("usual_prediction")),
        predicts=MappingProxyType(predicts),
        of=str(fields.get("of", "")),
    )


_MARK_KEYS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "any": frozenset({"at_least", "at_most", "instead"}),
        "none": frozenset(),
        "each": frozenset({"ndim", "dim", "size", "width_of"}),
        "numbered": frozenset({"count"}),
        "most": frozenset(),
    }
)


def _marks(data: object) -> tuple[Mark, ...]:
    return tuple(_mark(mapping(item)) for item in items(data))


def _mark(data: dict[str, object]) -> Mark:
    asks = [ask for ask in get_args(Ask) if ask in data]
    if len(asks) != 1:
        raise ValueError(f"a mark asks one of {', '.join(get_args(Ask))}: {data}")
    ask = cast(Ask, asks[0])
    check_keys(data, {ask, "says"} | _MARK_KEYS[ask])
    if ask == "each" and "ndim" not in data and not {"size", "width_of"} & data.keys():
        raise ValueError(f"`each` needs `ndim`, or `dim` with `size` or `width_of`: {data}")
    return Mark(
        ask=ask,
        patterns=texts(data[ask]),
        says=str(data["says"]),
        at_least=_int(data.get("at_least", 1)),
        at_most=_int(data.get("at_most", Mark.at_most)),
        instead=tuple(_text_mapping(data.get("instead")).items()),
        ndim=_int(data["ndim"]) if "ndim" in data else None,
        dim=_int(data.get("dim", 0)),
        sizes=tuple(_int(size) for size in items(data.get("size"))),
        width_of=texts(data.get("width_of")),
        count=_int(data.get("count", 0)),
    )


def _block_rules(data: object) -> tuple[BlockRule, ...]:
    return tuple(BlockRule(prefix, block) for prefix, block in _text_mapping(data).items())


def _text_mapping(data: object) -> dict[str, str]:
    return {key: str(value) for key, value in mapping(data).items()}


def _text_or_none(data: object) -> str | None:
    return None if data is None else str(data)


def _int(data: object) -> int:
    if not isinstance(data, int):
        raise TypeError(f"a whole number is wanted, not {data!r}")
    return data
