"""Key maps: what a single-file checkpoint's tensors are called in a diffusers folder, and back.

Everything known about a family's names stands in `families/keymaps/<id>.yaml`, read when it is
first asked for; this module holds the language of those files and no model's name. It knows names
and shapes, no values: no torch here.

    extends     another file; its `ranges`, `tables` and `adapters` hold where this one is silent
    ranges      letter → "first-last": the numbers a letter stands for between braces
    components  diffusers' component → prefix (or a list, the usual one first), names, adapters,
                ordinal, older (words of names in folders of earlier releases → today's)
    tables      name → names, for "@name"
    adapters, ordinals, fits
                what adapter files call modules: `AdapterNames`, `Ordinal`, `AdapterMark` below

`names` maps a tensor or a module, and everything below it, from the checkpoint's name (without its
prefix) to diffusers'. The longest name that fits decides; of two equal lines the later one does, in
both directions.

    {3*i+j}     a number. A line stands for all its letters' values, on both sides
    @table      a line for each line of that table, on both sides
    null        has no counterpart there (a buffer, a layer that is never run)
    [a, b, c]   rows, from the top: a third of the rows is `a`, the next `b`. `a*4` weighs four
    a[2/2]      the rows become the second half of `a`
    a reshaped  [out, in, 1, 1] in the checkpoint, [out, in] there
    a transposed
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ckptools.datafile import check_keys, items, mapping, texts
from ckptools.errors import InputError, nearest
from ckptools.tensors import TensorSpec

Op = Literal["none", "transpose", "reshape"]

_FOLDER = Path(__file__).parent / "families" / "keymaps"
_OPS: Mapping[str, Op] = MappingProxyType({"transposed": "transpose", "reshaped": "reshape"})


@dataclass(frozen=True)
class Piece:
    """Some rows of a checkpoint's tensor, and what they are in a diffusers folder.

    component  the folder: unet, text_encoder, text_encoder_2, transformer, vae …
    name       the tensor's name there
    rows       first row and the one after the last, in the checkpoint's tensor; None: all
    part       the same in diffusers' tensor; None: the piece is the whole tensor
    op         transpose: the other is the transposed tensor. reshape: [out, in, 1, 1] in the
               checkpoint, [out, in] there
    shape      of the piece, as it stands there
    """

    component: str
    name: str
    rows: tuple[int, int] | None
    part: tuple[int, int] | None
    op: Op
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterNames:
    """What stands before a component's module names in adapter files.

    underscored  prefixes of names with "_" for ".", diffusers' or the checkpoint's
    dotted       prefixes of diffusers' names
    original     prefixes of the checkpoint's names; its own prefix always is one
    optional     the start of diffusers' names that some libraries leave out
    kohya        whose names kohya's trainer writes: "diffusers" or "original"
    """

    underscored: tuple[str, ...] = ()
    dotted: tuple[str, ...] = ()
    original: tuple[str, ...] = ()
    optional: str = ""
    kohya: str = "diffusers"


@dataclass(frozen=True)
class Ordinal:
    """How a layout counts modules: by place in `first`, numbers, place in `modules`.

    prefix   stands before the number: "unet:"
    first    first words of diffusers' names, in the order they are met
    modules  ends of diffusers' names, in the order they are met within a layer
    """

    prefix: str
    first: tuple[str, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class AdapterMark:
    """A module name that speaks for a family; `inputs`: and the width it must take."""

    module: str
    says: str
    inputs: int | None = None


@dataclass(frozen=True)
class _Share:
    """One piece of a line: `share` of the line's rows become the part-th of `parts`."""

    name: str
    share: int = 1
    part: int = 0
    parts: int = 1
    op: Op = "none"


@dataclass(frozen=True, eq=False)
class Component:
    """A component's names in both layouts.

    prefixes  of the checkpoint's names, the usual one first
    lines     checkpoint's name without prefix → shares; () has no counterpart
    older     words of names that earlier releases of diffusers wrote → today's
    """

    id: str
    prefixes: tuple[str, ...]
    lines: Mapping[str, tuple[_Share, ...]]
    adapters: AdapterNames
    ordinal: Ordinal | None
    older: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def back(self) -> Mapping[str, tuple[str, int]]:
        """Diffusers' name → checkpoint's name without prefix, and which of its shares it is."""
        return MappingProxyType(
            {
                share.name: (name, index)
                for name, shares in self.lines.items()
                for index, share in enumerate(shares)
            }
        )

    def usual_name(self, name: str) -> str:
        """How a folder's tensor is called today; `name` where the map knows no other spelling.

        Earlier releases of diffusers called layers otherwise, and releases of transformers differ
        in whether a text model's names begin with "text_model.".
        """
        words = ".".join(self.older.get(word, word) for word in name.split("."))
        for spelling in (name, words, self.adapters.optional + name):
            if _longest(self.back, spelling) is not None:
                return spelling
        return name


@dataclass(frozen=True, eq=False)
class KeyMap:
    """One data file. Ask it about single tensors, in either direction.

    fits  what in an adapter speaks for the family, in groups, the surest first
    """

    family: str
    components: Mapping[str, Component]
    fits: tuple[tuple[AdapterMark, ...], ...] = ()

    def split(self, name: str) -> tuple[Component, str] | None:
        """The component of a checkpoint's tensor, and its name without the prefix."""
        for prefix, component in self._prefixes:
            if name.startswith(prefix):
                return component, name[len(prefix) :]
        return None

    def is_known(self, name: str) -> bool:
        """Whether the map has a line for a checkpoint's tensor."""
        found = self.split(name)
        return found is not None and _longest(found[0].lines, found[1]) is not None

    def pieces(self, spec: TensorSpec) -> tuple[Piece, ...] | None:
        """What a checkpoint's tensor is in a diffusers folder, by rows from the top.

        () has no counterpart there; None is a name that this map does not know. A tensor whose
        rows cannot be shared out is an InputError.
        """
        found = self.split(spec.name)
        if found is None:
            return None
        component, inner = found
        line = _longest(component.lines, inner)
        if line is None:
            return None
        shares, tail = component.lines[line], inner[len(line) :]
        starts = _row_bounds(spec, shares) if len(shares) > 1 else None
        pieces = []
        for index, share in enumerate(shares):
            rows = None if starts is None else (starts[index], starts[index + 1])
            op = share.op if share.op != "reshape" or spec.shape[2:] == (1, 1) else "none"
            shape = _shape_there(spec.shape, rows, op)
            part = None
            if share.parts > 1:
                part = (share.part * shape[0], (share.part + 1) * shape[0])
            pieces.append(Piece(component.id, share.name + tail, rows, part, op, shape))
        return tuple(pieces)

    def checkpoint_spec(self, component: str, spec: TensorSpec) -> TensorSpec | None:
        """The single file's tensor that holds a tensor of a folder's component, or None."""
        return _checkpoint_spec(self.components[component], spec)

    def checkpoint_specs(
        self, folders: Mapping[str, Mapping[str, TensorSpec]]
    ) -> dict[str, TensorSpec]:
        """The single file's tensors for a diffusers folder's: component → its tensors.

        `pieces` of each says where its rows come from. A tensor that the map does not know, or
        whose fellows are missing, is an InputError.
        """
        specs: dict[str, TensorSpec] = {}
        for component_id, tensors in folders.items():
            if component_id not in self.components:
                raise InputError(
                    f"{self.family} has no component {component_id!r}",
                    fix=nearest(component_id, self.components),
                )
            component = self.components[component_id]
            for name, spec in tensors.items():
                found = _checkpoint_spec(component, spec)
                if found is None:
                    raise InputError(
                        f"{self.family} has no such tensor in {component_id}", where=name
                    )
                specs[found.name] = found
            self._check_whole(component, specs, tensors)
        return specs

    def _check_whole(
        self,
        component: Component,
        specs: Mapping[str, TensorSpec],
        tensors: Mapping[str, TensorSpec],
    ) -> None:
        for spec in specs.values():
            for piece in self.pieces(spec) or ():
                if piece.component == component.id and piece.name not in tensors:
                    raise InputError(f"{piece.name!r} is missing", where=spec.name)

    @cached_property
    def _prefixes(self) -> tuple[tuple[str, Component], ...]:
        pairs = [(prefix, c) for c in self.components.values() for prefix in c.prefixes]
        return tuple(sorted(pairs, key=lambda pair: -len(pair[0])))


def diffusers_name(family: str, spec: TensorSpec) -> tuple[Piece, ...] | None:
    """What a checkpoint's tensor is in a diffusers folder: `KeyMap.pieces` of the family's map.

    >>> diffusers_name("sd1", TensorSpec("model.diffusion_model.out.2.bias", "F16", (4,)))
    (Piece(component='unet', name='conv_out.bias', rows=None, part=None, op='none', shape=(4,)),)
    """
    return key_map(family).pieces(spec)


def _longest(lines: Mapping[str, object], name: str) -> str | None:
    """The longest line that is `name` or a parent of it."""
    end = len(name)
    while end > 0:
        if name[:end] in lines:
            return name[:end]
        end = name.rfind(".", 0, end)
    return None


def _row_bounds(spec: TensorSpec, shares: tuple[_Share, ...]) -> list[int]:
    total = sum(share.share for share in shares)
    if not spec.shape or spec.shape[0] % total:
        raise InputError(
            f"{list(spec.shape)} does not hold {total} equal groups of rows", where=spec.name
        )
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + spec.shape[0] // total * share.share)
    return bounds


def _shape_there(shape: tuple[int, ...], rows: tuple[int, int] | None, op: Op) -> tuple[int, ...]:
    if rows is not None:
        shape = (rows[1] - rows[0], *shape[1:])
    match op:
        case "transpose":
            return shape[::-1]
        case "reshape":
            return shape[:2]
        case "none":
            return shape


def _checkpoint_spec(component: Component, spec: TensorSpec) -> TensorSpec | None:
    """The tensor of the single file that holds a tensor of the diffusers folder."""
    line = _longest(component.back, spec.name)
    if line is None:
        return None
    name, index = component.back[line]
    shares = component.lines[name]
    share = shares[index]
    shape = spec.shape
    if len(shares) > 1:
        total = sum(each.share for each in shares)
        rows = shape[0] // share.parts * total // share.share
        shape = (rows, *shape[1:])
    if share.op == "transpose":
        shape = shape[::-1]
    elif share.op == "reshape" and len(shape) == 2:
        shape = (*shape, 1, 1)
    tail = spec.name[len(line) :]
    return TensorSpec(component.prefixes[0] + name + tail, spec.dtype, shape)


# --- reading the data files ---------------------------------------------------------------------


def key_map_ids() -> tuple[str, ...]:
    """The families that have a key map, sorted."""
    return tuple(sorted(p.stem for p in _FOLDER.glob("*.yaml") if not p.stem.startswith("_")))


@cache
def key_map(family: str) -> KeyMap:
    """The key map of a family, read once. A family without one is an InputError."""
    return read_key_map(_FOLDER, family)


def read_key_map(folder: Path, family: str) -> KeyMap:
    """The key map `<family>.yaml` of a folder.

    A file that breaks the language is an InputError naming the file.
    """
    path = folder / f"{family}.yaml"
    if not path.is_file():
        raise InputError(f"no key map for {family!r}", fix=nearest(family, key_map_ids()))
    try:
        return _key_map(family, _read_with_base(folder, family))
    except (KeyError, TypeError, ValueError) as exc:
        raise InputError(f"not a key map: {exc}", where=path.name) from exc


_KEYS = ("extends", "ranges", "components", "tables", "adapters", "ordinals", "fits")
_COMPONENT_KEYS = ("prefix", "names", "adapters", "ordinal", "older")
_ADAPTER_KEYS = ("underscored", "dotted", "original", "optional", "kohya")


def _read_with_base(folder: Path, stem: str) -> dict[str, object]:
    data = _read_yaml(folder / f"{stem}.yaml")
    check_keys(data, _KEYS)
    if "extends" not in data:
        return data
    base = _read_with_base(folder, str(data["extends"]))
    merged = {**base, **data}
    for key in ("ranges", "tables", "adapters", "ordinals"):
        merged[key] = {**mapping(base.get(key)), **mapping(data.get(key))}
    return merged


def _read_yaml(path: Path) -> dict[str, object]:
    import yaml  # only who asks for a key map pays for it

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return mapping(yaml.load(path.read_text(encoding="utf-8"), Loader=loader))
    except yaml.YAMLError as exc:
        raise InputError(f"not YAML: {exc}", where=path.name) from exc


def _key_map(family: str, data: Mapping[str, object]) -> KeyMap:
    tables = {name: mapping(table) for name, table in mapping(data.get("tables")).items()}
    expander = _Expander(tables, _ranges(data.get("ranges")))
    adapters = mapping(data.get("adapters"))
    ordinals = mapping(data.get("ordinals"))
    components = {}
    for id_, raw in mapping(data["components"]).items():
        fields = mapping(raw)
        check_keys(fields, _COMPONENT_KEYS)
        components[id_] = Component(
            id=id_,
            prefixes=texts(fields["prefix"]),
            lines=MappingProxyType(dict(expander.lines(mapping(fields["names"])))),
            adapters=_adapter_names(adapters[str(fields["adapters"])]),
            ordinal=_ordinal(ordinals[str(fields["ordinal"])]) if "ordinal" in fields else None,
            older=_words(tables[str(fields["older"])]) if "older" in fields else {},
        )
    fits = tuple(
        tuple(_adapter_mark(item) for item in items(group)) for group in items(data.get("fits"))
    )
    return KeyMap(family, MappingProxyType(components), fits)


def _words(table: Mapping[str, object]) -> Mapping[str, str]:
    return MappingProxyType({word: str(now) for word, now in table.items()})


def _adapter_names(data: object) -> AdapterNames:
    fields = mapping(data)
    check_keys(fields, _ADAPTER_KEYS)
    return AdapterNames(
        underscored=texts(fields.get("underscored")),
        dotted=texts(fields.get("dotted")),
        original=texts(fields.get("original")),
        optional=str(fields.get("optional", "")),
        kohya=str(fields.get("kohya", "diffusers")),
    )


def _ordinal(data: object) -> Ordinal:
    fields = mapping(data)
    check_keys(fields, ("prefix", "first", "modules"))
    modules = [str(name) for group in items(fields["modules"]) for name in items(group)]
    return Ordinal(str(fields["prefix"]), texts(fields["first"]), tuple(modules))


def _adapter_mark(data: object) -> AdapterMark:
    fields = mapping(data)
    check_keys(fields, ("module", "inputs", "says"))
    inputs = fields.get("inputs")
    if inputs is not None and not isinstance(inputs, int):
        raise TypeError(f"a whole number is wanted, not {inputs!r}")
    return AdapterMark(str(fields["module"]), str(fields["says"]), inputs)


def _ranges(data: object) -> dict[str, range]:
    ranges = {}
    for letter, text in mapping(data).items():
        first, _, last = str(text).partition("-")
        ranges[letter] = range(int(first), int(last) + 1)
    return ranges


_TABLE = re.compile(r"@(\w+)")
_BRACES = re.compile(r"\{([^}]*)\}")
_TERM = re.compile(r"([+-]?)(?:(\d+)(?:\*([a-z]))?|([a-z]))")
_SHARE = re.compile(
    r"(?P<name>(?:\{[^}]*\}|[^\s*\[{])+)(?:\*(?P<share>\d+))?"
    r"(?:\[(?P<part>\d+)/(?P<parts>\d+)\])?(?: (?P<op>\w+))?"
)


class _Expander:
    """Writes out the lines that stand for many."""

    def __init__(
        self, tables: Mapping[str, Mapping[str, object]], ranges: Mapping[str, range]
    ) -> None:
        self._tables = tables
        self._ranges = ranges

    def lines(self, names: Mapping[str, object]) -> Iterator[tuple[str, tuple[_Share, ...]]]:
        for left, right in names.items():
            for name, words in self._without_tables(left, _right_texts(right)):
                yield from self._without_letters(name, [_share(text) for text in words])

    def _without_tables(
        self, left: str, rights: tuple[str, ...]
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        mark = _TABLE.search(left)
        if mark is None:
            yield left, rights
            return
        if not all(mark[0] in right for right in rights):
            raise ValueError(f"{mark[0]} stands on one side only of {left!r}")
        for inner, target in self._tables[mark[1]].items():
            targets = _right_texts(target)
            combined = tuple(right.replace(mark[0], each) for right in rights for each in targets)
            yield from self._without_tables(left.replace(mark[0], inner), combined)

    def _without_letters(
        self, name: str, shares: list[_Share]
    ) -> Iterator[tuple[str, tuple[_Share, ...]]]:
        texts = (name, *(share.name for share in shares))
        found = {c for text in texts for b in _BRACES.findall(text) for c in b if c.isalpha()}
        letters = sorted(found)
        for numbers in product(*(self._ranges[letter] for letter in letters)):
            values = dict(zip(letters, numbers, strict=True))
            written = _fill(name, values)
            if written is None:
                continue  # no block has a negative number
            yield (
                written,
                tuple(
                    _Share(_fill(s.name, values) or "", s.share, s.part, s.parts, s.op)
                    for s in shares
                ),
            )


def _fill(text: str, values: Mapping[str, int]) -> str | None:
    if "{" not in text:
        return text
    numbers = [_number(inner, values) for inner in _BRACES.findall(text)]
    if min(numbers) < 0:
        return None
    remaining = iter(numbers)
    return _BRACES.sub(lambda _: str(next(remaining)), text)


def _number(text: str, values: Mapping[str, int]) -> int:
    """The value of a sum such as "3*i+j+1" or "3-i"."""
    total, end = 0, 0
    for term in _TERM.finditer(text):
        if term.start() != end:
            break
        end = term.end()
        sign, factor, times, letter = term.groups()
        value = int(factor or 1) * (values[times or letter] if times or letter else 1)
        total += -value if sign == "-" else value
    if end != len(text) or not text:
        raise ValueError(f"not a sum: {text!r}")
    return total


def _right_texts(right: object) -> tuple[str, ...]:
    return () if right is None else texts(right)


def _share(text: str) -> _Share:
    found = _SHARE.fullmatch(text)
    if found is None or (found["op"] and found["op"] not in _OPS):
        raise ValueError(f"not a name with `*share`, `[part/parts]`, {' or '.join(_OPS)}: {text!r}")
    return _Share(
        name=found["name"],
        share=int(found["share"] or 1),
        part=int(found["part"] or 1) - 1,
        parts=int(found["parts"] or 1),
        op=_OPS[found["op"]] if found["op"] else "none",
    )
