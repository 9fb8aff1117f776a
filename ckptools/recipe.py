"""Recipes: YAML to a frozen `Recipe`, with file:line on every error and all errors at once.

YAML is read through `yaml.compose`, not `safe_load`: a node keeps its line, duplicate keys are
errors, and the field decides the type (`safe_load` reads `1e-3` as text and `on` as True).
Opens no model file and knows no tensor names.
"""

from __future__ import annotations

import keyword
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import yaml

from ckptools.errors import (
    CkptError,
    ManyErrors,
    OutputError,
    RecipeError,
    UsageError,
    closest,
    nearest,
    raise_all,
)
from ckptools.filetypes import SNIFF_BYTES, as_safetensors, file_type
from ckptools.formula import (
    BAKE,
    MAX_DEPTH,
    Call,
    Formula,
    Name,
    Scope,
    base_model,
    check_formula,
    formula_depth,
    names_in,
    parse_formula,
    unknown_name,
    used_names,
)
from ckptools.hubref import ADDRESS_FIX, is_address, is_hub_text, parse_hub_ref
from ckptools.lora.dora import Reading
from ckptools.methods import load_methods
from ckptools.selectors import ParamLine
from ckptools.tensors import RECIPE_DTYPES

SCHEMA_VERSION = 1
MAX_RECIPE_BYTES = 1_000_000
MIN_SHARD_BYTES = 1_000_000
MAX_SWEEP_VALUES = 100
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*((?:[kMGT]i?)?)B?\s*\Z")
_SIZE_FACTORS = {
    "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
_TRUE = {"true", "yes", "on"}
_FALSE = {"false", "no", "off"}
_YAML_TAGS = {
    f"tag:yaml.org,2002:{word}"
    for word in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value")
}


DORAS: tuple[Reading, ...] = ("trained", "comfy")


@dataclass(frozen=True)
class ModelRef:
    """One line of `models:`.

    path      as written; relative paths are relative to the recipe's folder. hf:// for a model on
              the Hub, its revision included
    sha256    a pin: any other file is refused; "" when not pinned
    where     file:line
    allow_unmatched  an adapter's tensors that fit nothing in the model are left out, not refused
    dora      how DoRA's norm is read: "trained", as its trainers define it, or "comfy"
    config    a weightless diffusers folder, for rendering; relative to the recipe's folder
    """

    name: str
    path: str
    sha256: str
    where: str
    allow_unmatched: bool = False
    dora: Reading = "trained"
    config: str = ""

    def blamed(self, error: CkptError, noun: str = "model") -> CkptError:
        """The error, with the recipe's line and name for the file that it is about."""
        error.what = f"{noun} {self.name!r}: {error.what}"
        error.where = f"{self.where}: {error.where}" if error.where else self.where
        if noun == "adapter" and not error.fix:
            error.fix = "download the file again, or ask its author"
        return error


@dataclass(frozen=True)
class ParamRef:
    """One line of `params:`: the numbers of an `mbw:` list, then selector lines, in order."""

    name: str
    lines: tuple[ParamLine, ...]
    mbw: tuple[float, ...]
    where: str


@dataclass(frozen=True)
class Output:
    """Where the result goes and how it is stored.

    dtypes       component (or "default") -> safetensors dtype name, or "keep" for the base's
    shard_bytes  largest data section of one file, or 0 for a single file
    metadata     the user's own entries for the file's `__metadata__`
    """

    path: str = ""
    dtypes: Mapping[str, str] = field(default_factory=lambda: {"default": "keep"})
    shard_bytes: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    overwrite: bool = False
    where: str = ""
    dtypes_where: str = ""


@dataclass(frozen=True)
class PromptRef:
    """One prompt of `render:`; the id is a word for file names."""

    id: str
    text: str
    negative: str | None = None


@dataclass(frozen=True)
class RenderRef:
    """The `render:` of a recipe; what it leaves out is None, and the model says what suits it.

    when     "after_save", "before_save" (a merge that fails its checks is not saved) or "never"
    against  files to compare with; None: the recipe's models
    check    run the deeper checks of `ckptools check` too
    folder   of the pictures; "" for the output's name with "-render"
    options  further keys: probes, negative, seeds, steps, sampler, guidance, size, clip_skip,
             image, mask, strength, image_guidance, control, condition, control_scale, config, vae,
             device, dtype
    """

    when: str
    prompts: tuple[PromptRef, ...]
    against: tuple[str, ...] | None
    check: bool
    folder: str
    options: Mapping[str, object]
    where: str


@dataclass(frozen=True)
class Publish:
    """The `publish:` section: where the result goes on the Hub, and what its card says.

    repo      owner/name, or a name of the user's own
    license   "" inherits the parents'
    licenses  model -> its licence, where its file does not say
    hub       model -> owner/name on the Hub, where it came from
    """

    repo: str = ""
    public: bool = False
    branch: str = ""
    tag: str = ""
    title: str = ""
    description: str = ""
    license: str = ""
    license_link: str = ""
    licenses: Mapping[str, str] = field(default_factory=dict)
    hub: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outline:
    """What a recipe says that a family's names decide about, whether or not the rest holds.

    base   the model that gives the names, or the first in a formula that cannot be read; "" where
           there is no telling
    used   the names that the formula uses
    params  those whose numbers could be read
    Everything else is as in `Recipe`.
    """

    path: Path
    models: Mapping[str, ModelRef]
    params: Mapping[str, ParamRef]
    base: str
    used: Collection[str]
    take: Mapping[str, tuple[str, str]]
    output: Output
    compat: str
    compat_where: str

    def file_of(self, model: ModelRef) -> Path:
        """As `Recipe.file_of`."""
        return _file_of(self.path, model)


@dataclass(frozen=True)
class Recipe:
    """A recipe that means something: every name is known, every formula has its type.

    path   the file it came from
    merge  the formula as written; `result` is it with the adapters of `loras:` baked in, which
           are among the models as loras[0] …, with parameters loras[0].weight …
    base   the model that gives the list of tensors, the metadata and the carried values
    take   component -> model whose tensors are taken byte for byte
    loras  the names of the adapters of `loras:` among the models, in order
    sweep  parameter -> the numbers that `ckptools sweep` tries, in order
    render  what to draw with the result; None where the recipe does not say
    """

    path: Path
    models: Mapping[str, ModelRef]
    params: Mapping[str, ParamRef]
    lets: Mapping[str, Formula]
    merge: Formula
    result: Formula
    base: str
    take: Mapping[str, tuple[str, str]]
    output: Output
    strict: bool
    allow_nonfinite: bool
    seed: int
    scope: Scope
    compat: str = ""
    compat_where: str = ""
    warnings: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    publish: Publish | None = None
    sweep: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    render: RenderRef | None = None

    def file_of(self, model: ModelRef) -> Path:
        """The path of a model, resolved against the recipe's folder; `~` is expanded.

        A model on the Hub is the path that stands for it (`hubref.HubRef.path`).
        """
        return _file_of(self.path, model)

    def beside(self, text: str) -> Path:
        """A path that the recipe names, resolved against its folder; `~` is expanded."""
        return _beside(self.path, text)

    @property
    def outline(self) -> Outline:
        """What a family's names decide about."""
        used = used_names(self.result, self.scope)
        return Outline(
            self.path, self.models, self.params, self.base, {*used}, self.take, self.output,
            self.compat, self.compat_where,
        )  # fmt: skip

    @property
    def is_remote(self) -> bool:
        """Whether some model is on the Hub."""
        return any(is_hub_text(model.path) for model in self.models.values())

    @property
    def output_path(self) -> Path:
        """The output's path, resolved against the recipe's folder.

        A symbolic link is followed: it stays, and the file it leads to is replaced. One that
        leads to itself is an `OutputError`.
        """
        path = self.beside(self.output.path)
        if not path.is_symlink():
            return path
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise OutputError(
                f"the output {os.path.normpath(path)!r} is a link that leads to itself",
                where=self.output.where,
                fix="remove it, or write elsewhere",
            )
        return target


def _file_of(recipe: Path, model: ModelRef) -> Path:
    return Path(model.path) if is_hub_text(model.path) else _beside(recipe, model.path)


def _beside(recipe: Path, text: str) -> Path:
    return recipe.parent / expanded(text)


def expanded(text: str) -> Path:
    """A path with `~` expanded, where it names a user that is there."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


@dataclass(frozen=True)
class Key:
    """One key of the recipe language: what it is for, and its JSON Schema.

    example  how it is written, where a value alone would not tell
    """

    text: str
    schema: Mapping[str, object] = field(default_factory=dict)
    required: bool = False
    example: str = ""


_TEXT: dict[str, object] = {"type": "string", "minLength": 1}
_NUMBER: dict[str, object] = {"type": "number"}
_FLAG: dict[str, object] = {"type": "boolean"}
_DTYPE: dict[str, object] = {"enum": ["keep", *RECIPE_DTYPES]}
_DORA: dict[str, object] = {"enum": [*DORAS]}
_NAMED: dict[str, object] = {"pattern": r"^[A-Za-z_][A-Za-z0-9_]*$"}
_SHA256_SCHEMA: dict[str, object] = {"type": "string", "pattern": "^[0-9A-Fa-f]{64}$"}


def _object(keys: Mapping[str, Key]) -> dict[str, object]:
    """The JSON Schema of a mapping with exactly these keys."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, key in keys.items() if key.required],
        "properties": {name: {"description": key.text, **key.schema} for name, key in keys.items()},
    }


def _map_of(schema: Mapping[str, object], **more: object) -> dict[str, object]:
    return {"type": "object", "additionalProperties": schema, **more}


_MBW: dict[str, object] = {
    "description": "Merge block weighted: BASE, IN, M, OUT (26 or 20).",
    "anyOf": [{"type": "array", "items": _NUMBER, "minItems": 1}, _TEXT],
}
_PARAM: dict[str, object] = {
    "anyOf": [_NUMBER, _map_of(_NUMBER, minProperties=1, properties={"mbw": _MBW})]
}
MODEL_KEYS: dict[str, Key] = {
    "path": Key(
        "A .safetensors file, a *.index.json of shards, a folder, or hf://owner/repo[/file].",
        _TEXT,
        required=True,
    ),
    "sha256": Key("A pin: the merge refuses any other file.", _SHA256_SCHEMA),
    "revision": Key("Git revision of an hf:// source.", _TEXT),
    "config": Key("A weightless diffusers folder, for rendering.", _TEXT),
    "allow_unmatched": Key("Leave out an adapter's tensors that fit nothing in the model.", _FLAG),
    "dora": Key("How DoRA's norm is read (default: as its trainers define it).", _DORA),
}
LORA_KEYS: dict[str, Key] = {
    **MODEL_KEYS,
    "weight": Key("How strongly it is baked: a number, or a map of selectors.", _PARAM),
}
OUTPUT_KEYS: dict[str, Key] = {
    "path": Key("The .safetensors file to write.", _TEXT, required=True),
    "dtype": Key(
        "What to store: keep (the base's dtype), one dtype, or a map of component to dtype.",
        {"anyOf": [_DTYPE, _map_of(_DTYPE, minProperties=1)]},
    ),
    "shard_size": Key(
        "Split the output into files of at most this much tensor data each, such as 5GB.",
        {"anyOf": [_TEXT, {"type": "integer", "minimum": MIN_SHARD_BYTES}]},
    ),
    "metadata": Key(
        "Entries of your own for the file's metadata.",
        _map_of({"type": ["string", "number", "boolean"]}),
    ),
    "overwrite": Key("Replace an existing output.", _FLAG),
}
WHENS = ("after_save", "before_save", "never")
_RENDER_DTYPES = ("auto", "fp16", "bf16", "fp32")
_WHOLE: dict[str, object] = {"type": "integer", "minimum": 0}
_SOME_TEXT: dict[str, object] = {"type": "array", "items": _TEXT, "minItems": 1}
PROMPT_KEYS: dict[str, Key] = {
    "prompt": Key("What to draw.", _TEXT, required=True),
    "negative": Key("What not to draw.", {"type": "string"}),
    "id": Key("A word for file names.", {"type": "string", "pattern": r"^\w[\w.-]*$"}),
}
RENDER_KEYS: dict[str, Key] = {
    "when": Key(
        "after_save (default), before_save (a merge that fails its checks is not saved) or never.",
        {"enum": [*WHENS]},
    ),
    "prompts": Key(
        "What to draw. Default: built-in prompts that suit the model.",
        {
            "type": "array",
            "items": {"anyOf": [_TEXT, _object(PROMPT_KEYS)]},
            "minItems": 1,
        },
    ),
    "probes": Key("Add the built-in prompts to those given.", _FLAG),
    "negative": Key("What not to draw, for prompts that do not say.", {"type": "string"}),
    "seeds": Key(
        "Draw every prompt from each of these.", {"type": "array", "items": _WHOLE, "minItems": 1}
    ),
    "steps": Key("Steps of a picture.", {"type": "integer", "minimum": 1, "maximum": 1000}),
    "sampler": Key("As the web UIs call it, such as DPM++ 2M Karras.", _TEXT),
    "guidance": Key("Classifier-free guidance.", _NUMBER),
    "size": Key(
        "Width and height in pixels, such as 512x768.",
        {"anyOf": [_TEXT, {"type": "array", "items": _WHOLE, "minItems": 2, "maxItems": 2}]},
    ),
    "clip_skip": Key("1: as the model was trained.", {"type": "integer", "minimum": 1}),
    "image": Key("A picture to start from, to edit or to inpaint.", _TEXT),
    "mask": Key("What to redraw is white in this picture.", _TEXT),
    "strength": Key("How much of the image is drawn anew, 0 to 1.", _NUMBER),
    "image_guidance": Key("Guidance by the image, for editing models.", _NUMBER),
    "control": Key("A ControlNet to draw with.", _TEXT),
    "condition": Key("The ControlNet's picture: a file, or a kind that is drawn.", _TEXT),
    "control_scale": Key("The ControlNet's weight.", _NUMBER),
    "against": Key(
        "What to compare with: parents (default), none, or files.",
        {"anyOf": [{"enum": ["parents", "none"]}, _SOME_TEXT]},
    ),
    "check": Key("Run the checks of `ckptools check` too.", _FLAG),
    "scores": Key(
        "A CLIP model's folder: score pictures by it, for information; no verdict.", _TEXT
    ),
    "folder": Key("Where the pictures go. Default: the output's name with -render.", _TEXT),
    "config": Key("A weightless diffusers folder, for models of unusual width.", _TEXT),
    "vae": Key("Draw with this VAE.", _TEXT),
    "device": Key("auto, cpu, cuda or mps.", _TEXT),
    "dtype": Key("Of UNet and text encoders.", {"enum": [*_RENDER_DTYPES]}),
}
PUBLISH_KEYS: dict[str, Key] = {
    "repo": Key("owner/name on the Hub, or a name of your own.", _TEXT),
    "public": Key("For everybody to see; private otherwise.", _FLAG),
    "branch": Key("Branch to commit to (default: main).", _TEXT),
    "tag": Key("Tag to set on the commit.", _TEXT),
    "title": Key("Heading of the card.", _TEXT),
    "description": Key("First words of the card.", _TEXT),
    "license": Key("Identifier of the licence; inherited where all parents agree.", _TEXT),
    "license_link": Key("Address of the licence's text.", _TEXT),
    "licenses": Key("Model to licence, where its file does not say.", _map_of(_TEXT)),
    "hub": Key("Model to owner/name on the Hub, where it came from.", _map_of(_TEXT)),
    "tags": Key("Tags of the card.", {"type": "array", "items": _TEXT}),
}
TOP_KEYS: dict[str, Key] = {
    "ckptools": Key(
        "Version of the recipe language.",
        {"const": SCHEMA_VERSION},
        required=True,
        example=f"ckptools: {SCHEMA_VERSION}",
    ),
    "models": Key(
        "Name to file. Names are used in formulas.",
        _map_of({"anyOf": [_TEXT, _object(MODEL_KEYS)]}, propertyNames=_NAMED, minProperties=1),
        required=True,
    ),
    "params": Key(
        "Name to number, or to a map of selector (default, component, block, block range, glob "
        "over tensor names) to number; the last line that matches wins.",
        _map_of(_PARAM, propertyNames=_NAMED),
    ),
    "let": Key("Named sub-formulas, in order.", _map_of(_TEXT, propertyNames=_NAMED)),
    "merge": Key("The formula, such as A + (B - C) * M.", _TEXT, required=True),
    "base": Key(
        "The model that gives the tensors, the metadata and the carried values. Default: the "
        "leftmost of the formula outside of differences; of ties and its like, their `base`.",
        _TEXT,
    ),
    "loras": Key(
        "Adapters to bake into the result, in this order.",
        {"type": "array", "items": {"anyOf": [_TEXT, _object(LORA_KEYS)]}},
    ),
    "take": Key("Component to model: taken byte for byte.", _map_of(_TEXT, minProperties=1)),
    "output": Key(
        "The file to write.",
        _object(OUTPUT_KEYS),
        required=True,
        example="output: {path: merged.safetensors}",
    ),
    "render": Key(
        "Draw test pictures of the result and check them.",
        {"anyOf": [_FLAG, _object(RENDER_KEYS)]},
    ),
    "publish": Key(
        "Where `ckptools publish` uploads to, and what the card says.", _object(PUBLISH_KEYS)
    ),
    "sweep": Key(
        "Parameter to the numbers that `ckptools sweep` tries: a list, or first:last:step.",
        _map_of(
            {"anyOf": [_TEXT, {"type": "array", "items": _NUMBER, "minItems": 1}]}, minProperties=1
        ),
    ),
    "strict": Key("Make carried tensors an error.", _FLAG),
    "allow_nonfinite": Key("Accept NaN and Inf.", _FLAG),
    "seed": Key("Seed of the methods that draw random numbers.", {"type": "integer", "minimum": 0}),
    "compat": Key("Another tool's mapping of block weights.", _TEXT),
}


def recipe_schema() -> dict[str, object]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ckptools recipe",
        "description": f"Recipe language version {SCHEMA_VERSION} of ckptools.",
        **_object(TOP_KEYS),
    }


# --- YAML nodes --------------------------------------------------------------------------------

T = TypeVar("T")
_NAMING = ("models", "params", "let")  # the sections whose keys are names in formulas


class _Reader:
    """Reads typed values off YAML nodes, collecting every error with its line.

    One mistake is told once: what follows from it is no mistake of its own.

    told     names that stand in the recipe, but not as they must: what uses them is not to blame
    is_open  whether a list of names could not be read, so that no name is known to be unknown
    unknown  name -> an error at every place where it is used
    broken   parameters whose numbers could not all be read
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.errors: list[CkptError] = []
        self.told: set[str] = set()
        self.is_open = False
        self.unknown: dict[str, list[CkptError]] = {}
        self.broken: set[str] = set()

    def lacks(self, name: str, names: Collection[str]) -> bool:
        """Whether a name is a mistake, and not one that is told already."""
        return name not in names and name not in self.told and not self.is_open

    def not_found(self, node: yaml.Node, name: str, what: str, known: Collection[str]) -> None:
        """A name that stands for nothing."""
        fix = nearest(name, known) or "the recipe has no `params:`"
        error = RecipeError(what, where=self.where(node), fix=fix)
        self.unknown.setdefault(name, []).append(error)

    def all_errors(self) -> list[CkptError]:
        """Every mistake, by line: as one mends them. An unknown name is one, however often used."""
        errors = [*self.errors]
        for places in self.unknown.values():
            first, *others = sorted(places, key=_line)
            lines = sorted({_line(other) for other in others} - {_line(first)})
            if lines:
                noun = "line" if len(lines) == 1 else "lines"
                fact, newline, shown = first.what.partition("\n")
                also = f"(in {noun} {', '.join(map(str, lines))} too)"
                first.what = f"{fact} {also}{newline}{shown}"
            errors.append(first)
        return sorted(errors, key=_line)

    def where(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def error(self, node: yaml.Node, what: str, fix: str = "") -> None:
        self.errors.append(RecipeError(what, where=self.where(node), fix=fix))

    def mapping(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key -> (key node, value node); duplicate and non-text keys are errors."""
        if not isinstance(node, yaml.MappingNode):
            self.error(
                node,
                f"{what} must be a mapping, it is {_shape(node)}",
                f"write lines `key: value` below {what}",
            )
            return {}
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.error(key, f"a key of {what} must be plain text", "write `name: value`")
            elif _is_null(value) and (slip := _slip(key.value)):
                self.told.add(key.value.partition(":")[0])
                self.error(key, f"{key.value!r} in {what} has no value", slip)
            elif key.value in found:
                first = found[key.value][0].start_mark.line + 1
                self.error(
                    key,
                    f"{key.value!r} is given twice (first in line {first})",
                    "keep one of the two",
                )
            else:
                found[key.value] = (key, value)
        return found

    def known(
        self,
        node: yaml.Node,
        what: str,
        keys: Mapping[str, Key],
        needless: Collection[str] = (),
    ) -> dict[str, yaml.Node]:
        """A mapping that may hold only `keys`, with the required ones present.

        needless  those that are not required after all
        Where one of these is misspelt, that is told, and it is read as what it was meant to be.
        """
        found = self.mapping(node, what)
        there = {name: value for name, (_, value) in found.items() if name in keys}
        for name, (key, value) in found.items():
            if name in keys:
                continue
            self.error(key, f"unknown key {name!r} in {what}", nearest(name, keys))
            meant = closest(name, keys)
            if meant and (keys[meant].required or meant in _NAMING):
                there.setdefault(meant, value)
        if isinstance(node, yaml.MappingNode):
            for name, row in keys.items():
                if row.required and name not in there and name not in needless:
                    such = f", such as `{row.example}`" if row.example else ""
                    fix = f"add `{name}:` ({row.text.rstrip('.')}){such}"
                    self.error(node, f"{what} has no {name!r}", fix)
        return there

    def text(self, node: yaml.Node, what: str) -> str | None:
        if not isinstance(node, yaml.ScalarNode) or _is_null(node) or not node.value.strip():
            self.error(node, f"{what} must be text, it is {_shape(node)}", "give it a value")
            return None
        if "\0" in node.value:
            self.error(node, f"{what} has a null character: {node.value!r}", "remove it")
            return None
        return str(node.value)

    def number(self, node: yaml.Node, what: str) -> float | None:
        try:
            value = float(node.value) if isinstance(node, yaml.ScalarNode) else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            self.error(node, f"{what} must be a number, it is {_shape(node)}", "such as 0.5")
            return None
        return value

    def whole(self, node: yaml.Node, what: str, maximum: int) -> int | None:
        text = node.value.replace("_", "") if isinstance(node, yaml.ScalarNode) else ""
        if not re.fullmatch(r"\d{1,20}", text) or int(text) > maximum:
            self.error(
                node,
                f"{what} must be a whole number from 0 to {maximum}, it is {_shape(node)}",
                "such as 42",
            )
            return None
        return int(text)

    def flag(self, node: yaml.Node, what: str) -> bool:
        word = node.value.lower() if isinstance(node, yaml.ScalarNode) else ""
        if word not in _TRUE | _FALSE:
            self.error(
                node, f"{what} must be true or false, it is {_shape(node)}", "write true or false"
            )
        return word in _TRUE

    def attempt(self, action: Callable[[], T]) -> T | None:
        """The action's result, or None with its errors collected."""
        try:
            return action()
        except CkptError as exc:
            self.errors += exc.errors if isinstance(exc, ManyErrors) else [exc]
            return None


def _line(error: CkptError) -> int:
    """The line that an error's place names; 0 where it names none."""
    found = re.search(r":(\d+)(?:$|:\d+$|: |, column)", error.where)
    return int(found[1]) if found else 0


_SHOWN_CHARS = 60


def _slip(key: str) -> str:
    """What was meant by a key that stands alone in braces, where that can be guessed."""
    name, colon, value = key.partition(":")
    if colon and name and value:
        return f"put a space after the colon: `{name}: {value}`"
    return "a decimal has a point: 0.5" if key.isdecimal() else ""


def _is_null(node: yaml.Node) -> bool:
    return (
        isinstance(node, yaml.ScalarNode)
        and node.style is None
        and node.value in ("", "~", "null", "Null", "NULL")
    )


def _shape(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if _is_null(node):
        return "empty"
    text = str(node.value)
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…")


_QUOTE_GLOBS = 'a glob that begins with * is written in quotes: "*attn2*": 0.5'
# What PyYAML says of common mistakes, and what to do about them.
_YAML_HINTS = {
    "scanning an alias": _QUOTE_GLOBS,
    "undefined alias": _QUOTE_GLOBS,
    "single document": "one recipe to a file: remove the `---` line and what follows it",
    "\\t": "indent with spaces",
    "expected <block end>": "indent the line as its neighbours are, and close what is open",
    "expected the node content": "close what is open: a bracket, a quote",
    "expected ','": "put a comma between the entries, and close what is open",
    "unknown escape character": "put paths with \\ in single quotes, or write them with /",
    "unexpected end of stream": "close the quote that is open",
    "cannot start any token": "put the value in quotes",
    "mapping values are not allowed": "is there a space after `:`, and is the indent right?",
}


def _compose(text: str, name: str) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        said = f"{exc.context or ''} {exc.problem or ''}".strip()
        fix = next((hint for words, hint in _YAML_HINTS.items() if words in said), "")
        raise RecipeError(f"not YAML: {said}", where=where, fix=fix) from exc
    except yaml.YAMLError as exc:
        said = str(exc).splitlines()[0]
        raise RecipeError(f"not YAML: {said}", where=name, fix="give a text file") from exc
    except RecursionError as exc:
        raise RecipeError(
            "nested too deeply", where=name, fix="a recipe has four levels at most"
        ) from exc
    except (ValueError, OverflowError) as exc:  # "\UFFFFFFFF"
        raise RecipeError(
            "not YAML: a character that there is not",
            where=name,
            fix="write it without backslashes",
        ) from exc
    if node is None:
        raise RecipeError("the recipe is empty", where=name, fix="begin with `ckptools: 1`")
    return node


def _check_nodes(reader: _Reader, root: yaml.Node) -> None:
    """Refuse `!tags`: nothing here gives them a meaning, and none is executed.

    And texts that no file could hold, with halves of characters ("\\uD800").
    """
    seen: set[int] = set()  # an alias may make a node its own child
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.tag not in _YAML_TAGS:
            shown = node.tag.replace("tag:yaml.org,2002:", "!!")
            reader.error(node, f"the tag {shown!r} has no meaning here", "remove it")
        if isinstance(node, yaml.ScalarNode) and any("\ud800" <= c <= "\udfff" for c in node.value):
            reader.error(node, "half of a character", "write the character itself, or all of it")
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]


# --- the recipe --------------------------------------------------------------------------------


Further = Callable[[Outline], Iterable[CkptError]]


def load_recipe(
    path: Path,
    *,
    overrides: Mapping[str, float] | None = None,
    output: Path | None = None,
    further: Further = lambda outline: (),
) -> Recipe:
    """Read a recipe file.

    overrides  parameter name -> number that replaces what the file says (`--set M=0.5`)
    output     where the result goes instead (`-o`); the recipe then needs no `output:`
    further    where there are mistakes: what else is wrong, as far as the models' files tell
    Raises `RecipeError` or `ManyErrors` with every mistake, each with file:line and a fix.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_RECIPE_BYTES + 1)
    except OSError as exc:
        raise RecipeError(
            f"the recipe cannot be read: {exc.strerror}", where=str(path), fix="check the path"
        ) from exc
    if len(raw) > MAX_RECIPE_BYTES:
        what = _no_recipe(raw) or "a recipe of more than 1 MB: is it a model?"
        raise RecipeError(what, where=str(path), fix="give a .yaml file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        what = _no_recipe(raw)
        fix = "give a .yaml file" if what else "save it as UTF-8"
        what = what or "the recipe is not UTF-8 text"
        raise RecipeError(what, where=str(path), fix=fix) from exc
    return parse_recipe(text, path, overrides=overrides, output=output, further=further)


def _no_recipe(raw: bytes) -> str:
    """What a file is that cannot be a recipe; "" where there is no telling."""
    if raw[8:9] == b"{":
        return "a safetensors file, not a recipe"
    found = file_type(raw[:SNIFF_BYTES])
    mark = ", not safetensors"
    return f"{found.what.partition(mark)[0]}, not a recipe" if found and mark in found.what else ""


def parse_recipe(
    text: str,
    path: Path,
    *,
    overrides: Mapping[str, float] | None = None,
    output: Path | None = None,
    further: Further | None = None,
) -> Recipe:
    """As `load_recipe`, for text in hand; `path` names it and anchors relative paths.

    further  None: files are not looked for
    """
    reader = _Reader(str(path))
    root = _compose(text, reader.name)
    _check_nodes(reader, root)
    keys = reader.known(root, "the recipe", TOP_KEYS, needless={"output"} if output else ())
    _check_version(reader, keys.get("ckptools"))
    _find_lost_names(reader, root, keys)
    models = _models(reader, keys.get("models"))
    params = _params(reader, keys.get("params"), models)
    loras, weights = _loras(reader, keys.get("loras"))
    sweep = _sweep(reader, keys.get("sweep"), params | weights)
    render = _render(reader, keys.get("render"))
    target = _output(reader, keys.get("output"), output)
    seed = reader.whole(keys["seed"], "seed", 2**63 - 1) if "seed" in keys else 0
    compat = (reader.text(keys["compat"], "compat") if "compat" in keys else "") or ""
    compat_where = reader.where(keys["compat"]) if "compat" in keys else ""
    strict = "strict" in keys and reader.flag(keys["strict"], "strict")
    allow_nonfinite = "allow_nonfinite" in keys and reader.flag(
        keys["allow_nonfinite"], "allow_nonfinite"
    )
    base = _model_name(reader, keys.get("base"), "base", models)
    take = _take(reader, keys.get("take"), models)
    publish = _publish(reader, keys.get("publish"), {*models, *loras})
    scope = Scope(frozenset(models), frozenset(params), {}, load_methods())
    scope, merge = _formulas(reader, keys.get("let"), keys.get("merge"), scope)
    params, weights = _set_params(reader, params, weights, overrides or {})
    errors: list[CkptError] = [*reader.all_errors()]
    if errors and further:  # else whoever opens the files tells
        words = _words(keys.get("merge"), keys.get("let"))
        used = words if merge is None else used_names(merge, scope)
        if merge is not None:
            base = base or base_model(merge, scope)
        elif not any(scope.methods[word].kinds for word in words if word in scope.methods):
            base = base or next((word for word in words if word in models), "")
        numbers = {n: ref for n, ref in (params | weights).items() if n not in reader.broken}
        outline = Outline(
            path, models | loras, numbers, base, {*used, *weights}, take, target or Output(),
            compat, compat_where,
        )  # fmt: skip
        errors += further(outline)
    raise_all(sorted(errors, key=_line))  # the rest leans on names and types that hold
    if merge is None or target is None:
        raise AssertionError("a missing key is an error above")
    warnings = _unused(merge, scope, params, {m for m, _ in take.values()} | {base}, models)
    scope = replace(
        scope,
        models=scope.models | loras.keys(),
        params=scope.params | weights.keys(),
        types={},
    )
    return Recipe(
        path=path,
        models=MappingProxyType(models | loras),
        params=MappingProxyType(params | weights),
        lets=scope.lets,
        merge=merge,
        result=_with_loras(merge, loras),
        base=base or base_model(merge, scope),
        take=MappingProxyType(take),
        output=target,
        strict=strict,
        allow_nonfinite=allow_nonfinite,
        seed=seed or 0,
        scope=scope,
        compat=compat,
        compat_where=compat_where,
        warnings=warnings,
        loras=tuple(loras),
        publish=publish,
        sweep=MappingProxyType(sweep),
        render=render,
    )


def _words(*nodes: yaml.Node | None) -> list[str]:
    """Every name in the formulas below some nodes, whether or not they can be read, in order."""
    seen: set[int] = set()
    texts = [node.value for root in nodes if root is not None for node in _scalars(root, seen)]
    return [word for text in texts for word in re.findall(r"[^\W\d]\w*", text)]


def _scalars(node: yaml.Node, seen: set[int]) -> Iterator[yaml.ScalarNode]:
    """The text below a node, keys left out; each node once, for an alias may be its own child."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _scalars(value, seen)


def _check_version(reader: _Reader, node: yaml.Node | None) -> None:
    if node is not None and (not isinstance(node, yaml.ScalarNode) or node.value != "1"):
        reader.error(
            node,
            f"the recipe is in version {_shape(node)} of the recipe language; this release reads "
            f"version {SCHEMA_VERSION}",
            "write `ckptools: 1`, or use the ckptools release the recipe was made for",
        )


def _check_result(reader: _Reader, merge: Formula, kind: str) -> None:
    if kind == "delta":
        reader.errors.append(
            merge.error(
                "the result is a difference of models, not a model",
                merge.tree.column,
                "add it to a model: A + (…)",
            )
        )
    elif kind == "scalar":
        reader.errors.append(merge.error("the result is a number, not a model", 1, "name a model"))


def _find_lost_names(reader: _Reader, root: yaml.Node, read: Mapping[str, yaml.Node]) -> None:
    """Names below a key that is a mistake itself: unknown, or given a second time."""
    if not isinstance(root, yaml.MappingNode):
        return
    for _, value in root.value:
        if isinstance(value, yaml.MappingNode) and not any(value is node for node in read.values()):
            reader.told |= {key.value for key, _ in value.value if isinstance(key, yaml.ScalarNode)}
    for section in _NAMING:
        if section in read and not isinstance(read[section], yaml.MappingNode):
            reader.is_open = True
    if "models" not in read:
        reader.is_open = True


def _identifier(reader: _Reader, key: yaml.Node, name: str, what: str) -> None:
    if not _IDENTIFIER.match(name) or keyword.iskeyword(name):
        reader.told |= {name, *re.split(r"\W+", name)}  # `my-model` is a difference in a formula
    if not _IDENTIFIER.match(name):
        reader.error(
            key,
            f"{name!r} cannot be the name of a {what}",
            "use letters, digits and _; it stands in formulas",
        )
    elif keyword.iskeyword(name):
        reader.error(key, f"{name!r} cannot be the name of a {what}", "Python reserves this word")
    elif name in load_methods() or name == BAKE:
        reader.error(key, f"{name!r} is the name of a method", f"give the {what} another name")


def _models(reader: _Reader, node: yaml.Node | None) -> dict[str, ModelRef]:
    models: dict[str, ModelRef] = {}
    if node is None:
        return models
    for name, (key, value) in reader.mapping(node, "models").items():
        _identifier(reader, key, name, "model")
        fields = {"path": value}
        if isinstance(value, yaml.MappingNode):
            fields = reader.known(value, f"model {name!r}", MODEL_KEYS)
        models[name] = _model(reader, name, fields, reader.where(key))
    if not models and isinstance(node, yaml.MappingNode):
        reader.error(node, "no models", "add `A: path/to/model.safetensors`")
    return models


def _model(reader: _Reader, name: str, fields: Mapping[str, yaml.Node], where: str) -> ModelRef:
    """One source, from the nodes of its keys."""
    what = name if name.startswith("loras[") else f"model {name!r}"
    text = {
        key: reader.text(fields[key], f"`{key}` of {what}") or ""
        for key in ("path", "sha256", "revision", "config")
        if key in fields
    }
    sha256 = text.get("sha256", "").lower()
    if sha256 and not _SHA256.match(sha256):
        reader.error(fields["sha256"], f"{sha256!r} is not a sha256", "64 hexadecimal digits")
    path = text.get("path", "")
    if is_hub_text(path):
        try:
            path = str(parse_hub_ref(path, text.get("revision", "")))
        except UsageError as exc:
            reader.error(fields["path"], exc.what, exc.fix)
    elif "revision" in fields:
        reader.error(fields["revision"], "`revision` is for hf:// sources", "remove it")
    unmatched = fields.get("allow_unmatched")
    dora = _one_of(reader, fields.get("dora"), "dora", DORAS)
    return ModelRef(
        name=name,
        path=path,
        sha256=sha256,
        where=where,
        allow_unmatched=unmatched is not None and reader.flag(unmatched, "allow_unmatched"),
        dora="comfy" if dora == "comfy" else "trained",
        config=text.get("config", ""),
    )


def _loras(
    reader: _Reader, node: yaml.Node | None
) -> tuple[dict[str, ModelRef], dict[str, ParamRef]]:
    """The adapters of `loras:` as models `loras[0]` …, and their weights as parameters."""
    refs: dict[str, ModelRef] = {}
    weights: dict[str, ParamRef] = {}
    if node is None:
        return refs, weights
    if not isinstance(node, yaml.SequenceNode):
        reader.error(
            node, f"loras must be a list, it is {_shape(node)}", "write `- {path: …, weight: 0.8}`"
        )
        return refs, weights
    for number, item in enumerate(node.value):
        name = f"loras[{number}]"
        fields = {"path": item}
        if isinstance(item, yaml.MappingNode):
            fields = reader.known(item, name, LORA_KEYS)
        weight = fields.pop("weight", None)
        refs[name] = _model(reader, name, fields, reader.where(item))
        weights[lora_weight(name)] = (
            _param(reader, lora_weight(name), weight)
            if weight is not None
            else ParamRef(
                lora_weight(name),
                (ParamLine("default", 1.0, reader.where(item)),),
                (),
                reader.where(item),
            )
        )
    return refs, weights


def lora_weight(lora: str) -> str:
    """The parameter that holds the weight of a `loras:` entry."""
    return f"{lora}.weight"


def _with_loras(merge: Formula, loras: Collection[str]) -> Formula:
    """The formula with every adapter of `loras:` baked into its result, in order."""
    tree = merge.tree
    for name in loras:
        arguments = (tree, Name(name, 1), Name(lora_weight(name), 1))
        tree = Call(BAKE, arguments, (), 1)
    return Formula(merge.text, tree, merge.where)


def _params(
    reader: _Reader, node: yaml.Node | None, models: Collection[str]
) -> dict[str, ParamRef]:
    params: dict[str, ParamRef] = {}
    items = reader.mapping(node, "params") if node is not None else {}
    for name, (key, value) in items.items():
        _identifier(reader, key, name, "parameter")
        if name in models:
            reader.error(key, f"{name!r} is a model too", "give the parameter another name")
        params[name] = _param(reader, name, value)
    return params


def _set_params(
    reader: _Reader,
    params: Mapping[str, ParamRef],
    weights: Mapping[str, ParamRef],
    overrides: Mapping[str, float],
) -> tuple[dict[str, ParamRef], dict[str, ParamRef]]:
    """Parameters and adapters' weights, with the command line's numbers for their lines."""
    known, found = {**params, **weights}, {**params, **weights}
    for name, number in overrides.items():
        if name in known:
            found[name] = ParamRef(name, (ParamLine("default", number, "--set"),), (), "--set")
        elif reader.lacks(name, known):
            fix = nearest(name, known) or "the recipe has no `params:`"
            what = f"unknown parameter {name!r}"
            reader.errors.append(UsageError(what, where="--set", fix=fix))
    return {name: found[name] for name in params}, {name: found[name] for name in weights}


def _param(reader: _Reader, name: str, node: yaml.Node) -> ParamRef:
    so_far = len(reader.errors)
    found = _lines(reader, name, node)
    if len(reader.errors) > so_far:
        reader.broken.add(name)
    return found


def _lines(reader: _Reader, name: str, node: yaml.Node) -> ParamRef:
    where, what = reader.where(node), f"parameter {name!r}"
    if isinstance(node, yaml.SequenceNode):
        reader.error(
            node,
            f"{what} must be a number or a map of selectors, it is a list",
            f"block weights are written `{name}: {{mbw: […]}}`",
        )
        return ParamRef(name, (), (), where)
    if not isinstance(node, yaml.MappingNode):
        value = reader.number(node, what)
        return ParamRef(name, (ParamLine("default", value or 0.0, where),), (), where)
    items = reader.mapping(node, what)
    mbw: tuple[float, ...] = ()
    if "mbw" in items:
        if next(iter(items)) != "mbw":
            reader.error(
                items["mbw"][0],
                f"{what}: `mbw` must be the first line",
                "lines below it may override single selectors",
            )
        node = items.pop("mbw")[1]
        mbw = _numbers(reader, node, f"mbw of {what}")
        if isinstance(node, yaml.SequenceNode) and not mbw:
            reader.error(
                node, f"mbw of {what} is empty", "such as [0.5, 0.5, …], one for each block"
            )
    elif not items:
        reader.error(node, f"{what} is empty", "add `default: 0.5`")
    lines = [
        ParamLine(selector, reader.number(value, f"{selector!r} of {what}") or 0.0,
                  reader.where(key))
        for selector, (key, value) in items.items()
    ]  # fmt: skip
    return ParamRef(name, tuple(lines), mbw, where)


def _numbers(reader: _Reader, node: yaml.Node, what: str) -> tuple[float, ...]:
    if isinstance(node, yaml.ScalarNode) and "," in node.value:  # as the web UIs print them
        parts = [part.strip() for part in node.value.split(",")]
        nodes: Sequence[yaml.Node] = [
            yaml.ScalarNode(node.tag, part, node.start_mark, node.end_mark) for part in parts
        ]
    elif isinstance(node, yaml.SequenceNode):
        nodes = node.value
    else:
        reader.error(
            node, f"{what} must be a list of numbers, it is {_shape(node)}", "such as [0.5, 0.5, …]"
        )
        return ()
    return tuple(reader.number(item, what) or 0.0 for item in nodes)


def with_numbers(recipe: Recipe, numbers: Mapping[str, float], *, where: str = "--set") -> Recipe:
    """The recipe with these numbers for whole parameters, in place of their lines.

    An entry of `loras:` has its weight under `loras[0].weight`. An unknown name is a `RecipeError`.
    """
    params = dict(recipe.params)
    for name, number in numbers.items():
        if name not in params:
            raise RecipeError(
                f"unknown parameter {name!r}",
                where=where,
                fix=nearest(name, params) or "the recipe has no `params:`",
            )
        params[name] = ParamRef(name, (ParamLine("default", number, where),), (), where)
    return replace(recipe, params=MappingProxyType(params))


def parse_values(text: str, where: str = "") -> tuple[float, ...]:
    """The numbers of `0:1:0.25` (first, last, step; both ends taken) or `0,0.5,1`.

    Counted in decimals: 0:1:0.1 holds 0.3, not 0.30000000000000004. Raises `RecipeError`.
    """
    parts = text.split(":") if ":" in text else text.split(",")
    try:
        numbers = [Decimal(part.strip()) for part in parts]
    except InvalidOperation:
        numbers = []
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise RecipeError(f"{text!r} is no list of numbers", where=where, fix=_VALUES_FIX)
    if ":" not in text:
        return _few([float(number) for number in numbers], text, where)
    if len(numbers) != 3 or not numbers[2] or (numbers[1] - numbers[0]) / numbers[2] < 0:
        raise RecipeError(f"{text!r} leads nowhere", where=where, fix=_VALUES_FIX)
    first, last, step = numbers
    count = min((last - first) / step, Decimal(MAX_SWEEP_VALUES)) + 1
    return _few([float(first + step * n) for n in range(int(count))], text, where)


_VALUES_FIX = "write first:last:step, such as 0:1:0.25, or a list, such as 0,0.5,1"


def _few(values: Sequence[float], text: str, where: str) -> tuple[float, ...]:
    """The values, each once; more than anybody looks at are a `RecipeError`."""
    once = tuple(dict.fromkeys(values))
    if len(once) > MAX_SWEEP_VALUES:
        raise RecipeError(
            f"{text} is more than {MAX_SWEEP_VALUES} values", where=where, fix="take a larger step"
        )
    return once


def _sweep(
    reader: _Reader, node: yaml.Node | None, params: Collection[str]
) -> dict[str, tuple[float, ...]]:
    """Parameter -> the numbers to try."""
    items = reader.mapping(node, "sweep") if node is not None else {}
    if node is not None and isinstance(node, yaml.MappingNode) and not items:
        reader.error(node, "sweep is empty", "such as `M: [0, 0.5, 1]`")
    found: dict[str, tuple[float, ...]] = {}
    for name, (key, value) in items.items():
        if reader.lacks(name, params):
            reader.not_found(key, name, f"sweep names the unknown parameter {name!r}", params)
        what, where = f"sweep of {name!r}", reader.where(value)
        if isinstance(value, yaml.ScalarNode) and not _is_null(value):
            found[name] = reader.attempt(partial(parse_values, value.value, where)) or ()
            continue
        numbers = _numbers(reader, value, what)
        if isinstance(value, yaml.SequenceNode) and not numbers:
            reader.error(value, f"{what} has no numbers", "such as [0, 0.5, 1]")
        found[name] = reader.attempt(partial(_few, numbers, what, where)) or ()
    return found


def _formulas(
    reader: _Reader, lets: yaml.Node | None, merge: yaml.Node | None, scope: Scope
) -> tuple[Scope, Formula | None]:
    """The scope with each `let` added in order (one may use those above it), and the merge.

    None in the merge's place where it, or one of the `let`s, does not hold.
    """
    items = reader.mapping(lets, "let") if lets is not None else {}
    parsed: dict[str, Formula] = {}
    for name, (key, value) in items.items():
        _identifier(reader, key, name, "let")
        if name in scope.models or name in scope.params:
            reader.error(key, f"{name!r} is a model or a parameter too", "use another name")
            continue
        formula = _formula(reader, value, f"let {name!r}")
        if formula is None:
            reader.told.add(name)
        else:
            parsed[name] = formula
    result = _formula(reader, merge, "merge")
    _find_unknown(reader, parsed, result, scope)
    scope, depths = _checked_lets(reader, parsed, replace(scope, is_open=reader.is_open))
    is_deep = result is not None and formula_depth(result, depths) > MAX_DEPTH
    if result is not None and is_deep and max(depths.values(), default=0) <= MAX_DEPTH:
        reader.errors.append(_too_deep(result, "merge"))
    if result is None or is_deep:
        return scope, None
    kind = reader.attempt(partial(check_formula, result, _with_told(reader, scope)))
    if kind is not None:
        _check_result(reader, result, kind)
    return scope, result if kind and scope.lets.keys() == items.keys() else None


def _find_unknown(
    reader: _Reader, lets: Mapping[str, Formula], merge: Formula | None, scope: Scope
) -> None:
    """Every name of the formulas that stands for nothing, with all its places."""
    above: dict[str, Formula] = {}
    for let, formula in [*lets.items(), *([("", merge)] if merge else [])]:
        for name in names_in(formula.tree):
            if name.id not in lets and reader.lacks(name.id, scope.models | scope.params):
                error = unknown_name(formula, name, replace(scope, lets=above))
                reader.unknown.setdefault(name.id, []).append(error)
        above[let] = formula


def _with_told(reader: _Reader, scope: Scope) -> Scope:
    return replace(scope, told=frozenset({*reader.told, *reader.unknown}))


def _checked_lets(
    reader: _Reader, parsed: Mapping[str, Formula], scope: Scope
) -> tuple[Scope, Mapping[str, int]]:
    """The scope with those that mean something, and how deep each is nested."""
    lets: dict[str, Formula] = {}
    depths: dict[str, int] = {}
    waiting = dict(parsed)
    for name, formula in parsed.items():
        later = [word for word in names_in(formula.tree) if word.id in waiting]
        for word in later:
            what, fix = f"{word.id!r} is defined later", "put it above this line"
            if word.id == name:
                what, fix = f"{name!r} stands for itself", "use names that are defined above"
            reader.errors.append(formula.error(what, word.column, fix))
        del waiting[name]
        depths[name] = depth = formula_depth(formula, depths)
        if depth > MAX_DEPTH:
            if all(depths.get(word.id, 0) <= MAX_DEPTH for word in names_in(formula.tree)):
                reader.errors.append(_too_deep(formula, f"let {name!r}"))
            reader.told.add(name)
            continue
        check = partial(check_formula, formula, _with_told(reader, scope))
        if later or reader.attempt(check) is None:
            reader.told.add(name)
            continue
        lets[name] = formula
        scope = replace(scope, lets=MappingProxyType(dict(lets)))
    return scope, depths


def _too_deep(formula: Formula, what: str) -> RecipeError:
    return RecipeError(
        f"{what}: with the `let`s that it uses, the formula is nested more than {MAX_DEPTH} deep",
        where=formula.where,
        fix="merge in two steps, with a file in between",
    )


def _formula(reader: _Reader, node: yaml.Node | None, what: str) -> Formula | None:
    """A formula that parses; None, without a word, for one that names what cannot be a name."""
    text = reader.text(node, what) if node is not None else None
    if node is None or text is None:
        return None
    if any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in reader.told):
        try:
            return parse_formula(text, where=reader.where(node))
        except RecipeError:
            return None
    return reader.attempt(partial(parse_formula, text, where=reader.where(node)))


def _model_name(
    reader: _Reader, node: yaml.Node | None, what: str, models: Mapping[str, ModelRef]
) -> str:
    name = reader.text(node, what) if node is not None else ""
    if node is not None and name and reader.lacks(name, models):
        reader.not_found(node, name, f"{what}: unknown model {name!r}", models)
    return name or ""


def _take(
    reader: _Reader, node: yaml.Node | None, models: Mapping[str, ModelRef]
) -> dict[str, tuple[str, str]]:
    """Component -> (model, file:line)."""
    items = reader.mapping(node, "take") if node is not None else {}
    if isinstance(node, yaml.MappingNode) and not node.value:
        reader.error(node, "take is empty", "such as `vae: V`, or leave it out")
    return {
        component: (_model_name(reader, value, f"take {component!r}", models), reader.where(key))
        for component, (key, value) in items.items()
    }


def _publish(reader: _Reader, node: yaml.Node | None, models: Collection[str]) -> Publish | None:
    if node is None:
        return None
    keys = reader.known(node, "publish", PUBLISH_KEYS)
    named: dict[str, dict[str, str]] = {"licenses": {}, "hub": {}}
    for key, found in named.items():
        if key not in keys:
            continue
        for model, (where, value) in reader.mapping(keys[key], key).items():
            if reader.lacks(model, models):
                reader.not_found(where, model, f"{key}: unknown model {model!r}", models)
            found[model] = reader.text(value, f"{key} {model!r}") or ""
    tags = keys.get("tags")
    if tags is not None and not isinstance(tags, yaml.SequenceNode):
        reader.error(tags, f"tags must be a list, it is {_shape(tags)}", "write [art, anime]")

    def text(key: str) -> str:
        return reader.text(keys[key], key) or "" if key in keys else ""

    return Publish(
        repo=text("repo"),
        branch=text("branch"),
        tag=text("tag"),
        title=text("title"),
        description=text("description"),
        license=text("license"),
        license_link=text("license_link"),
        public="public" in keys and reader.flag(keys["public"], "public"),
        licenses=MappingProxyType(named["licenses"]),
        hub=MappingProxyType(named["hub"]),
        tags=tuple(reader.text(item, "a tag") or "" for item in tags.value)
        if isinstance(tags, yaml.SequenceNode)
        else (),
    )


def _output(reader: _Reader, node: yaml.Node | None, given: Path | None) -> Output | None:
    """The output; with another path where the command line gives one."""
    if node is None:
        return None if given is None else _elsewhere(Output(), given)
    if isinstance(node, yaml.ScalarNode) and node.value:
        what = f"output must be a mapping, it is {_shape(node)}"
        named = Path(node.value).name not in ("", ".", "..")
        path = str(as_safetensors(Path(node.value))) if named else "merged.safetensors"
        reader.error(node, what, f"write `output: {{path: {path}}}`")
        return None
    keys = reader.known(node, "output", OUTPUT_KEYS, needless={"path"} if given else ())
    path = (reader.text(keys["path"], "output path") if "path" in keys else "") or ""
    if path and (path.endswith(("/", "\\")) or Path(path).name in ("", "..", ".safetensors")):
        reader.error(
            keys["path"],
            f"the output {path!r} does not name a file",
            f"such as {str(Path(path.removesuffix('.safetensors')) / 'merged.safetensors')!r}",
        )
    elif path and not path.endswith(".safetensors"):
        reader.error(
            keys["path"],
            f"the output {path!r} does not end in .safetensors",
            f"write {str(as_safetensors(Path(path)))!r}",
        )
    if is_address(path):
        what = f"the output {path!r} is no path of this machine"
        reader.error(keys["path"], what, ADDRESS_FIX)
    if path.startswith("~") and expanded(path) == Path(path):
        reader.error(
            keys["path"], f"there is no user {Path(path).parts[0][1:]!r}", "write the path in full"
        )
    dtypes = {"default": "keep"}
    if "dtype" in keys:
        dtypes |= _dtypes(reader, keys["dtype"])
    shard_bytes = _size(reader, keys["shard_size"]) if "shard_size" in keys else 0
    metadata = {}
    if "metadata" in keys:
        for name, (key, value) in reader.mapping(keys["metadata"], "metadata").items():
            if name.startswith("ckptools.") or name in _OWN_METADATA:
                reader.error(key, f"metadata {name!r} is for ckptools to write", "leave it out")
            if not name:
                reader.error(key, "a key of metadata is empty", "give it a name")
            metadata[name] = reader.text(value, f"metadata {name!r}") or ""
    output = Output(
        path=path,
        dtypes=MappingProxyType(dtypes),
        shard_bytes=shard_bytes,
        metadata=MappingProxyType(metadata),
        overwrite="overwrite" in keys and reader.flag(keys["overwrite"], "overwrite"),
        where=reader.where(node),
        dtypes_where=reader.where(keys["dtype"]) if "dtype" in keys else reader.where(node),
    )
    if given is None or _beside(Path(reader.name), path).absolute() == given.absolute():
        return output
    return _elsewhere(output, given)


def _elsewhere(output: Output, path: Path) -> Output:
    """The output in another place: that the recipe's own may be replaced says nothing of that."""
    return replace(output, path=str(path.absolute()), where="--output", overwrite=False)


# The record of the merge, and what loaders go by.
_OWN_METADATA = {"format", "sd_merge_recipe", "sd_merge_models", "modelspec.hash_sha256"}


def _dtypes(reader: _Reader, node: yaml.Node) -> dict[str, str]:
    if isinstance(node, yaml.MappingNode):
        items = reader.mapping(node, "dtype").items()
        if not node.value:
            reader.error(node, "dtype is empty", "such as `dtype: fp16`, or `{vae: fp32}`")
        return {name: _dtype(reader, value) for name, (_, value) in items}
    return {"default": _dtype(reader, node)}


def _dtype(reader: _Reader, node: yaml.Node) -> str:
    name = _one_of(reader, node, "dtype", ("keep", *RECIPE_DTYPES))
    return RECIPE_DTYPES.get(name, "keep")


def _one_of(reader: _Reader, node: yaml.Node | None, what: str, choices: Collection[str]) -> str:
    word = reader.text(node, what) if node is not None else ""
    if node is not None and word and word not in choices:
        reader.error(node, f"unknown {what} {word!r}", nearest(word, choices))
    return word or ""


def _size(reader: _Reader, node: yaml.Node) -> int:
    found = _SIZE.match(node.value) if isinstance(node, yaml.ScalarNode) else None
    if found is None:
        reader.error(node, f"shard_size must be a size, it is {_shape(node)}", "such as 5GB")
        return 0
    nbytes = int(float(found[1]) * _SIZE_FACTORS[found[2]])
    if nbytes < MIN_SHARD_BYTES:
        reader.error(node, f"shard_size of {nbytes:,} bytes is below 1 MB", "such as 5GB")
    return nbytes


def _unused(
    merge: Formula,
    scope: Scope,
    params: Mapping[str, ParamRef],
    other_models: Collection[str],
    models: Mapping[str, ModelRef],
) -> tuple[str, ...]:
    """A name that nothing uses is often a typo somewhere else."""
    used = {word.id for word in names_in(merge.tree)}
    for name, formula in reversed(list(scope.lets.items())):  # a `let` may use those above it
        if name in used:
            used |= {word.id for word in names_in(formula.tree)}
    unused = [(f.where, f"let {name!r}") for name, f in scope.lets.items() if name not in used]
    unused += [(p.where, f"parameter {name!r}") for name, p in params.items() if name not in used]
    unused += [
        (model.where, f"model {name!r}")
        for name, model in models.items()
        if name not in used and name not in other_models
    ]
    return tuple(f"{where}: {what} is not used" for where, what in unused)


# --- render ------------------------------------------------------------------------------------

_FILE_WORD = re.compile(r"\w[\w.-]*")
_PICTURE_SIZE = re.compile(r"\s*(\d{1,5})\s*[xX]\s*(\d{1,5})\s*\Z")


def _render(reader: _Reader, node: yaml.Node | None) -> RenderRef | None:
    """`render: true` draws with every default; `false` is as good as nothing."""
    if node is None:
        return None
    where = reader.where(node)
    if isinstance(node, yaml.ScalarNode) and not _is_null(node):
        wanted = reader.flag(node, "render")
        return RenderRef("after_save", (), None, False, "", {}, where) if wanted else None
    keys = reader.known(node, "render", RENDER_KEYS)
    options: dict[str, object] = {}
    for name, item in keys.items():
        value = _render_option(reader, name, item)
        if value is not None:
            options[name] = value
    return RenderRef(
        when=_one_of(reader, keys.get("when"), "time to render", WHENS) or "after_save",
        prompts=_prompts(reader, keys.get("prompts")),
        against=_against(reader, keys.get("against")),
        check="check" in keys and reader.flag(keys["check"], "check"),
        folder=(reader.text(keys["folder"], "folder") if "folder" in keys else "") or "",
        options=MappingProxyType(options),
        where=where,
    )


def _render_option(reader: _Reader, name: str, node: yaml.Node) -> object:
    """The value of one plain key of `render:`; None for those that are read elsewhere."""
    match name:
        case "when" | "prompts" | "against" | "check" | "folder":
            return None
        case "probes":
            return reader.flag(node, name)
        case "negative":
            return str(node.value) if isinstance(node, yaml.ScalarNode) else reader.text(node, name)
        case "seeds":
            items = node.value if isinstance(node, yaml.SequenceNode) else [node]
            if not items:
                reader.error(node, "seeds is empty", "such as [1, 2]")
            seeds = [reader.whole(item, "a seed", 2**63 - 1) for item in items]
            return tuple(seed for seed in seeds if seed is not None)
        case "steps" | "clip_skip":
            number = reader.whole(node, name, 1000)
            if number == 0:
                reader.error(node, f"{name} must be 1 at least", "such as 20")
            return number
        case "guidance" | "strength" | "image_guidance" | "control_scale":
            return reader.number(node, name)
        case "dtype":
            return _one_of(reader, node, "dtype to draw with", _RENDER_DTYPES) or None
        case "size":
            return _picture_size(reader, node)
        case _:
            return reader.text(node, name)


def _picture_size(reader: _Reader, node: yaml.Node) -> tuple[int, int] | None:
    """(width, height) of `512x768` or [512, 768]."""
    if isinstance(node, yaml.SequenceNode) and len(node.value) == 2:
        width, height = (reader.whole(item, "a side", 99_999) for item in node.value)
    else:
        found = _PICTURE_SIZE.match(node.value) if isinstance(node, yaml.ScalarNode) else None
        if found is None:
            said = f"size must be width x height, it is {_shape(node)}"
            reader.error(node, said, "such as 512x768")
            return None
        width, height = int(found[1]), int(found[2])
    if not width or not height:
        reader.error(node, "a side of the size is 0", "such as 512x768")
        return None
    return width, height


def _prompts(reader: _Reader, node: yaml.Node | None) -> tuple[PromptRef, ...]:
    if node is None:
        return ()
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        reader.error(
            node, f"prompts must be a list, it is {_shape(node)}", 'such as ["a red circle"]'
        )
        return ()
    made: list[PromptRef] = []
    for number, item in enumerate(node.value, start=1):
        fields = {"prompt": item}
        if isinstance(item, yaml.MappingNode):
            fields = reader.known(item, f"prompt {number}", PROMPT_KEYS)
        text = reader.text(fields["prompt"], f"prompt {number}") if "prompt" in fields else ""
        own = reader.text(fields["id"], "id") if "id" in fields else ""
        if own and not _FILE_WORD.fullmatch(own):
            reader.error(
                fields["id"], f"the id {own!r} is no word for file names", "letters, digits, _ - ."
            )
        negative = fields.get("negative")
        made.append(
            PromptRef(
                own or f"prompt{number}",
                text or "",
                str(negative.value) if isinstance(negative, yaml.ScalarNode) else None,
            )
        )
        if [each.id for each in made].count(made[-1].id) > 1:
            reader.error(item, f"two prompts are called {made[-1].id!r}", "give one another id")
    return tuple(made)


def _against(reader: _Reader, node: yaml.Node | None) -> tuple[str, ...] | None:
    """Files; None for the recipe's models."""
    if isinstance(node, yaml.SequenceNode):
        return tuple(reader.text(item, "a file of `against`") or "" for item in node.value)
    word = reader.text(node, "against") if node is not None else "parents"
    return {"parents": None, "none": ()}.get(word or "parents", (word or "",))
