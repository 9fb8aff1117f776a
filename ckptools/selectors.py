"""Params: which number holds for which tensor. Knows names only, never values or shapes.

A param is a list of lines `selector: value`; the last line that matches a tensor wins. Selectors:

    default            every tensor
    unet               a component of the family
    IN04, IN00-IN11    a block, or a range in the family's order of blocks; several words
                       ("BASE IN00-IN11", "vae M00") select what any of them selects
    *attn2*            a glob over tensor names (case-sensitive; anything with * ? [ or a dot)
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from types import MappingProxyType

from ckptools.errors import CkptError, InputError, RecipeError, closest, nearest, raise_all
from ckptools.family import Family, load_families

_WILDCARDS = frozenset("*?[")
_GLOB_LETTERS = _WILDCARDS | {"."}
_BLOCK_LIKE = re.compile(r"(BASE|IN|M|MID|OUT)\d{0,3}", re.IGNORECASE)


@dataclass(frozen=True)
class ParamLine:
    """One line of a param.

    where         file:line, for messages
    may_be_empty  no error if no tensor is selected: a line that stands for one of many numbers
    """

    selector: str
    value: float
    where: str = ""
    may_be_empty: bool = False


@dataclass(frozen=True)
class Param:
    """Lines in the order of the recipe."""

    lines: tuple[ParamLine, ...]

    @classmethod
    def plain(cls, value: float, where: str = "") -> Param:
        """A plain number: one line that selects every tensor."""
        return cls((ParamLine("default", value, where),))


@dataclass(frozen=True, eq=False)
class CompiledParam:
    """A param resolved for the tensors of one file.

    lines     tensor name → the line that wins; protected tensors that no line selects are absent
    shadowed  lines that select something but win nowhere: most likely a mistake in their order
    """

    name: str
    lines: Mapping[str, ParamLine]
    shadowed: tuple[ParamLine, ...]

    def line_of(self, tensor_name: str) -> ParamLine:
        """The winning line; a RecipeError for a tensor that was not among the names."""
        line = self.lines.get(tensor_name)
        if line is None:
            raise RecipeError(
                f"param {self.name!r}: no value for {tensor_name}", fix="add `default:`"
            )
        return line

    def value_of(self, tensor_name: str) -> float:
        """The number that holds for a tensor; a RecipeError as for `line_of`."""
        return self.line_of(tensor_name).value

    @property
    def values(self) -> tuple[float, ...]:
        """All numbers that hold for some tensor, sorted."""
        return tuple(sorted({line.value for line in self.lines.values()}))


_NO_NAMES: Mapping[str, str] = MappingProxyType({})


def compile_param(
    param: Param,
    *,
    name_of_param: str,
    family: Family,
    names: Collection[str],
    compat: str = "",
    taken: Collection[str] = (),
    own: Mapping[str, str] = _NO_NAMES,
) -> CompiledParam:
    """Every tensor's number, or all that is wrong with the param, in one go.

    names   the tensor names of the base
    compat  another tool's assignment of blocks, a key of `family.compat`
    taken   components that are taken as they are from another model: none of `names` is theirs,
            and lines for them have no say
    own     name -> the file's own spelling, which globs may use as well
    Errors (RecipeError, or ManyErrors): a selector that is unknown or selects nothing, a value that
    is no finite number, a tensor without a value (protected tensors need none).
    """
    grounds = _Grounds.of(family, names, compat, own)
    errors: list[CkptError] = []
    winning: dict[str, ParamLine] = {}
    for line in param.lines:
        if line.selector in taken:
            continue
        selected = _checked_selection(line, grounds, errors)
        winning.update(dict.fromkeys(selected, line))
    missing = [n for n in names if n not in winning and not family.is_protected(n)]
    if missing and not errors:
        errors.append(no_value_for(missing, family, param.lines[0].where if param.lines else ""))
    for error in errors:
        error.what = f"param {name_of_param!r}: {error.what}"
    raise_all(errors)
    winners = {id(line) for line in winning.values()}
    return CompiledParam(
        name=name_of_param,
        lines=winning,
        shadowed=tuple(
            line
            for line in param.lines
            if not (id(line) in winners or line.may_be_empty or line.selector in taken)
        ),
    )


def mbw_lines(values: Sequence[float], family: Family, where: str = "") -> tuple[ParamLine, ...]:
    """The lines that "merge block weighted" numbers stand for, one per block, BASE first.

    A wrong count is a RecipeError that names the right one: 26 for sd1 and sd2, 20 for sdxl.
    """
    blocks = family.blocks
    if not blocks:
        raise RecipeError(
            f"`mbw` needs a family with merge blocks; this one is {family.id!r}",
            where=where,
            fix="give a number, or globs over tensor names",
        )
    if len(values) != len(blocks):
        raise RecipeError(
            f"`mbw` has {len(values)} numbers; {family.id} takes {len(blocks)}",
            where=where,
            fix=_count_fix(len(values), family),
        )
    return tuple(
        ParamLine(block, value, where, may_be_empty=True)
        for block, value in zip(blocks, values, strict=True)
    )


def _count_fix(count: int, family: Family) -> str:
    order = _ranges_in_words(family.blocks)
    if count == len(family.blocks) - 1:
        return f"put the number for BASE in front: {order}"
    ids = [f.id for f in load_families().values() if f.blocks and len(f.blocks) == count]
    others = sorted(ids, key=lambda id_: (len(id_), id_))  # the models most people have come first
    if others:
        return f"{count} is the count of {', '.join(others)}; {family.id} has {order}"
    return f"give one number for each of {order}"


@dataclass(frozen=True)
class _Grounds:
    """What selectors are resolved against: each set of tensors in the order of the file."""

    family: Family
    names: tuple[str, ...]
    components: Mapping[str, list[str]]
    blocks: Mapping[str, list[str]]
    own: Mapping[str, str]

    @classmethod
    def of(
        cls, family: Family, names: Collection[str], compat: str, own: Mapping[str, str]
    ) -> _Grounds:
        components: dict[str, list[str]] = {}
        blocks: dict[str, list[str]] = {}
        try:
            for name in names:
                components.setdefault(family.component_of(name), []).append(name)
                blocks.setdefault(family.block_of(name, compat), []).append(name)
        except InputError as exc:  # an unknown compat name stands in the recipe
            raise RecipeError(exc.what, where=exc.where, fix=exc.fix) from exc
        return cls(family, tuple(names), components, blocks, own)

    @property
    def known_components(self) -> tuple[str, ...]:
        return (*self.family.components, "other")

    @property
    def held_components(self) -> list[str]:
        """The components that have a tensor here."""
        return [name for name in self.known_components if name in self.components]

    def glob(self, pattern: str) -> list[str]:
        """Names that fit, by the file's own or their canonical spelling."""
        if not _WILDCARDS & set(pattern):  # a line for every tensor is a dictionary's work
            return self._spelt.get(pattern, [])
        matches = re.compile(translate(pattern)).match
        fitting = {name for spelling, names in self._spelt.items() if matches(spelling)
                   for name in names}  # fmt: skip
        return [name for name in self.names if name in fitting]

    @cached_property
    def _spelt(self) -> Mapping[str, list[str]]:
        """Every spelling of every tensor -> the names that are spelt so."""
        spelt: dict[str, list[str]] = {}
        for name in self.names:
            own = self.own.get(name, name)
            for spelling in dict.fromkeys((name, self.family.canonical_name(name), own)):
                spelt.setdefault(spelling, []).append(name)
        return spelt


def _checked_selection(
    line: ParamLine, grounds: _Grounds, errors: list[CkptError]
) -> Collection[str]:
    """The tensors of a line; what is wrong with it goes to `errors`."""
    if not math.isfinite(line.value):
        errors.append(RecipeError(f"{line.selector}: {line.value} is not finite", where=line.where))
    try:
        selected = _select(line.selector, grounds)
    except RecipeError as error:
        errors.append(error.at(line.where))
        return ()
    if not selected and not line.may_be_empty:
        errors.append(_matches_nothing(line, grounds))
    return selected


def _select(selector: str, grounds: _Grounds) -> Collection[str]:
    if selector == "default":
        return grounds.names
    if _GLOB_LETTERS & set(selector):
        return grounds.glob(selector)
    words = selector.split()
    if not words:
        raise RecipeError("a selector is empty", fix="`default`, a component, blocks or a glob")
    return [name for word in words for name in _select_word(word, grounds)]


def _select_word(word: str, grounds: _Grounds) -> list[str]:
    if word in grounds.known_components:
        return grounds.components.get(word, [])
    blocks = grounds.family.blocks
    if word in blocks:
        return grounds.blocks.get(word, [])
    first, dash, last = word.partition("-")
    if not dash or not {first, last} <= set(blocks):
        raise _unknown_word(word, grounds)
    start, end = blocks.index(first), blocks.index(last)
    if start > end:
        raise RecipeError(f"range {word!r} runs backwards", fix=f"write {last}-{first}")
    return [name for block in blocks[start : end + 1] for name in grounds.blocks.get(block, [])]


def _unknown_word(word: str, grounds: _Grounds) -> RecipeError:
    """Why a word names neither a component nor blocks, and the nearest that does."""
    family, known = grounds.family, grounds.held_components
    ends = word.split("-")
    if set(word.upper().split("-")) <= set(family.blocks):
        return RecipeError(
            f"no block {word!r}", fix=f"block names are upper case: {word.upper()!r}"
        )
    if any(_BLOCK_LIKE.fullmatch(end) for end in ends):
        strange = next((end for end in ends if end not in family.blocks), word)
        order = _ranges_in_words(family.blocks)
        fix = f"its blocks are {order}" if order else "use a glob over tensor names"
        meant = "-".join(map(_two_digits, ends))
        if set(meant.split("-")) <= set(family.blocks):
            fix = f"did you mean {meant!r}?"
        return RecipeError(f"{family.id} has no block {strange!r}", fix=fix)
    hint = nearest(word.lower(), ["default", *known, *family.blocks])
    if not hint.startswith("did you mean"):  # the blocks in short, not all 26
        hint = f"known: {', '.join(['default', *known])}, {_ranges_in_words(family.blocks)}"
        hint = f"{hint.rstrip(', ')}, or a glob such as '*attn2*'"
    return RecipeError(f"{word!r} is neither a component nor a block of {family.id}", fix=hint)


def _two_digits(block: str) -> str:
    """A block as families write it: OUT03 for out3, M00 for MID."""
    letters = block.upper().rstrip("0123456789")
    digits = block[len(letters) :]
    letters = "M" if letters == "MID" else letters
    return letters if letters == "BASE" else f"{letters}{int(digits or 0):02}"


def _matches_nothing(line: ParamLine, grounds: _Grounds) -> RecipeError:
    selector = line.selector
    what = f"{selector!r} matches none of the {len(grounds.names)} tensors"
    if not _GLOB_LETTERS & set(selector):
        held = ", ".join(grounds.held_components)
        return RecipeError(what, where=line.where, fix=f"leave it out; this model holds {held}")
    fix = "a glob must fit the whole name: put '*' at either end"
    part = selector.strip("*").rstrip(".")
    if selector.split()[1:]:
        fix = "a glob stands alone: give each word a line of its own"
    elif part in (*grounds.known_components, *grounds.family.blocks):
        fix = f"did you mean {part!r}?"
    elif grounds.glob(f"*{selector}*"):
        fix = f"a glob must fit the whole name: '*{selector.strip('*')}*' does"
    elif grounds.glob(f"*{selector.lower()}*"):
        fix = f"globs are case-sensitive: {selector.lower()!r} matches"
    elif near := _similar_part(selector.strip("*"), grounds.names):
        fix = f"did you mean '*{near}*'?"
    return RecipeError(what, where=line.where, fix=fix)


def _similar_part(text: str, names: Collection[str]) -> str:
    """The part of a tensor's name, between dots, that is nearest to a text; "" for none."""
    parts = sorted({part for name in names for part in name.split(".")})
    return closest(text, parts)


def no_value_for(missing: Sequence[str], family: Family, where: str) -> RecipeError:
    """The error of tensors that no line of a param selects."""
    components = sorted({family.component_of(name) for name in missing})
    fix = f"add `default:`, or a line for {', '.join(components)}"
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return RecipeError(f"no value for {missing[0]}{more}", where=where, fix=fix)


def _ranges_in_words(blocks: Sequence[str]) -> str:
    """Block names in short: "BASE IN00-IN08 M00 OUT00-OUT08"."""
    runs: list[list[str]] = []
    for block in blocks:
        letters = block.rstrip("0123456789")
        if runs and runs[-1][0].rstrip("0123456789") == letters:
            runs[-1][1:] = [block]
        else:
            runs.append([block])
    return " ".join("-".join(run) for run in runs)
