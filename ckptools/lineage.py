"""Where a file comes from, as its own metadata tells: trainers', mergers' and ModelSpec's entries.

Metadata is untrusted: any length, any text, JSON that is none. Everything decoded here is bounded,
and what cannot be read is said, never raised. Opens no file, knows no tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

MODEL_SPEC = "modelspec."
OWN_RECIPE = "ckptools.recipe"
WEB_UI_RECIPE = "sd_merge_recipe"
WEB_UI_MODELS = "sd_merge_models"
MERGED_FROM = "modelspec.merged_from"
_MOST_JSON = 4_000_000
_MOST_VALUE = 100_000
_MOST_TOTAL = 4_000_000
_MOST_ENTRIES = 2_000
_MOST_ANCESTORS = 500
_DEEPEST = 24
_MOST_TEXT = 300
_ORDINALS = ("primary", "secondary", "tertiary")


@dataclass(frozen=True)
class Ancestor:
    """A model that a file was made from, or the file itself.

    name     file name or title, as the metadata has it
    role     what the recipe calls it: "A", "detail", "secondary"; "" where it has no name
    how      the formula or method that made it; "" where it is not known to be a merge
    sha256   of its file; "" where unknown
    parents  what it was made from, in the recipe's order
    note     "named before" where the line was cut to end a circle or a flood
    """

    name: str
    role: str = ""
    how: str = ""
    sha256: str = ""
    parents: tuple[Ancestor, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Lineage:
    """What a file's metadata tells.

    root       the tree of parents; None where no entry tells of any
    told_by    the entry that the tree was read from
    tools      what wrote the file, as far as its entries show: "ckptools 0.1.0", "kohya sd-scripts"
    modelspec  ModelSpec's fields without their prefix
    decoded    key → the JSON that its text holds
    entries    all entries, long values cut; `cut` has the length of each of those
    left_out   entries beyond what is listed
    notes      what could not be read, in words
    """

    root: Ancestor | None = None
    told_by: str = ""
    tools: tuple[str, ...] = ()
    modelspec: Mapping[str, str] = field(default_factory=dict)
    decoded: Mapping[str, object] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)
    cut: Mapping[str, int] = field(default_factory=dict)
    left_out: int = 0
    notes: tuple[str, ...] = ()


def read_lineage(
    metadata: Mapping[str, str], name: str, *, recipe: Mapping[str, object] | None = None
) -> Lineage:
    """Everything that the `__metadata__` of the file `name` tells; never raises.

    recipe  of the manifest beside the file: used where the file itself holds none

    Sources: ModelSpec 1.0.1 (Stability-AI/ModelSpec); AUTOMATIC1111 web UI, `modules/extras.py`,
    `run_modelmerger` (sd_merge_recipe, sd_merge_models); kohya-ss/sd-scripts, `train_network.py`
    (ss_*).
    """
    entries, cut = _bounded(metadata)
    notes: list[str] = []
    decoded: dict[str, object] = {} if recipe is None else {OWN_RECIPE: recipe}
    length = 0
    for key, text in metadata.items():
        if text[:1] in ("{", "[") and key in entries:
            length += len(text)
            document = _json(text) if length <= 2 * _MOST_JSON else None
            if document is not None:
                decoded[key] = document
            elif key in (OWN_RECIPE, WEB_UI_RECIPE, WEB_UI_MODELS) or key.startswith("ss_"):
                notes.append(f"metadata {_short(key)!r} is not JSON that can be read")
    root, told_by = _tree(metadata, decoded, name)
    return Lineage(
        root=root,
        told_by=told_by,
        tools=_tools(metadata, decoded),
        modelspec={
            key[len(MODEL_SPEC) :]: value
            for key, value in sorted(entries.items())
            if key.startswith(MODEL_SPEC)
        },
        # what is shown cut is not shown decoded either: a file may hold 100 MB of it
        decoded={
            key: document for key, document in decoded.items() if key in entries and key not in cut
        },
        entries=entries,
        cut=cut,
        left_out=len(metadata) - len(entries),
        notes=tuple(notes),
    )


def _bounded(metadata: Mapping[str, str]) -> tuple[dict[str, str], dict[str, int]]:
    """The entries with long values cut, and how long those were."""
    entries: dict[str, str] = {}
    cut: dict[str, int] = {}
    total = 0
    for key in sorted(metadata)[:_MOST_ENTRIES]:
        value = metadata[key]
        most = _MOST_VALUE if total < _MOST_TOTAL else _MOST_TEXT
        shown = _short(key) if len(key) > _MOST_VALUE else key
        entries[shown] = value[:most]
        total += len(shown) + min(len(value), most)
        if len(value) > most:
            cut[shown] = len(value)
    return entries, cut


def _short(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"


def _json(text: str) -> object:
    """The JSON of a text; None where it is none, too long, or too deep. Numbers are finite."""
    if len(text) > _MOST_JSON:
        return None
    try:
        document: object = json.loads(text, parse_constant=str, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return document if _depth_is_fair(document) else None


def _finite(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def _depth_is_fair(document: object) -> bool:
    """Whether whoever walks the document, `json.dumps` for one, stays clear of the stack's end."""
    level = [document]
    for _ in range(200):
        if not level:
            return True
        level = [child for node in level for child in _children(node)]
    return False


def _children(node: object) -> Iterator[object]:
    if isinstance(node, dict):
        yield from node.values()
    elif isinstance(node, list):
        yield from node


# --- who wrote it ------------------------------------------------------------------------------

_SIGNS = (
    ("mecha_recipe", "sd-mecha"),
    ("ss_network_module", "kohya sd-scripts"),
    ("ss_training_started_at", "kohya sd-scripts"),
    ("ot_revision", "OneTrainer"),
    ("training_info", "ai-toolkit"),
    ("lora_adapter_metadata", "diffusers"),
)


def _tools(metadata: Mapping[str, str], decoded: Mapping[str, object]) -> tuple[str, ...]:
    """Programs that left their mark in the entries, each once."""
    found = []
    if OWN_RECIPE in metadata:
        found.append(f"ckptools {_short(metadata.get('ckptools.version', ''))}".strip())
    recipe = decoded.get(WEB_UI_RECIPE)
    if isinstance(recipe, dict):
        kind = _text(recipe.get("type"))
        known = {"webui": "AUTOMATIC1111 web UI", "ckptools": ""}
        found.append(known.get(kind, kind))
    found += [tool for key, tool in _SIGNS if key in metadata]
    return tuple(dict.fromkeys(tool for tool in found if tool))


# --- the tree ----------------------------------------------------------------------------------


def _tree(
    metadata: Mapping[str, str], decoded: Mapping[str, object], name: str
) -> tuple[Ancestor | None, str]:
    """The tree of parents and the entry that tells it, the most exact entry first."""
    walk = _Walk(decoded.get(WEB_UI_MODELS))
    for key in (OWN_RECIPE, WEB_UI_RECIPE):
        recipe = decoded.get(key)
        if isinstance(recipe, dict):
            root = walk.merged(name, recipe, path=())
            if root.parents:
                return root, key
    parents = [part.strip() for part in metadata.get(MERGED_FROM, "")[:_MOST_JSON].split(",")]
    named = tuple(Ancestor(_short(part)) for part in parents[:_MOST_ANCESTORS] if part)
    if named:
        return Ancestor(_short(name), how="merged", parents=named), MERGED_FROM
    return None, ""


@dataclass(frozen=True)
class _Parent:
    role: str
    name: str = ""
    sha256: str = ""


class _Walk:
    """Follows recipes back through `sd_merge_models`: sha256 → {name, sd_merge_recipe}."""

    def __init__(self, models: object) -> None:
        self._models: dict[str, dict[str, object]] = {
            str(key): value
            for key, value in (models.items() if isinstance(models, dict) else ())
            if isinstance(value, dict)
        }
        # files whose hash nobody computed are found by their name, where only one has it
        self._by_name: dict[str, list[str]] = {}
        for key, value in self._models.items():
            self._by_name.setdefault(_text(value.get("name")), []).append(key)
        self._count = 0

    def merged(self, name: str, recipe: Mapping[str, object], *, path: tuple[str, ...]) -> Ancestor:
        """What a recipe made, with everything it was made from.

        path  keys of the models on the way here: none may come again
        """
        parents = []
        for parent in _parents(recipe):
            if self._count >= _MOST_ANCESTORS:
                parents.append(Ancestor("…", note="more are named"))
                break
            self._count += 1
            parents.append(self._ancestor(parent, path))
        return Ancestor(_short(name), how=_how(recipe), parents=tuple(parents))

    def _ancestor(self, parent: _Parent, path: tuple[str, ...]) -> Ancestor:
        key = self._key(parent)
        model = self._models.get(key, {})
        own = _text(model.get("name"))
        sha256 = parent.sha256 or ("" if ":" in key else key)
        name = own or parent.name or (f"sha256 {sha256[:12]}" if sha256 else "unnamed")
        recipe = model.get(WEB_UI_RECIPE)
        if isinstance(recipe, str):
            recipe = _json(recipe)
        found = Ancestor(name, role=parent.role, sha256=sha256)
        if not isinstance(recipe, dict):
            return found
        if key in path or len(path) >= _DEEPEST:
            return Ancestor(name, role=parent.role, sha256=sha256, note="named before")
        made = self.merged(name, recipe, path=(*path, key))
        return Ancestor(name, parent.role, made.how, sha256, made.parents)

    def _key(self, parent: _Parent) -> str:
        if parent.sha256 in self._models:
            return parent.sha256
        keys = self._by_name.get(parent.name, [])
        if parent.name and len(keys) == 1 and not (parent.sha256 and ":" not in keys[0]):
            return keys[0]
        return ""


def _parents(recipe: Mapping[str, object]) -> list[_Parent]:
    """What a recipe of any tool names: ckptools' `models`, or the web UI's three hashes."""
    hashes = {word: _text(recipe.get(f"{word}_model_hash")) for word in _ORDINALS}
    models = recipe.get("models")
    if not isinstance(models, dict):
        return [_Parent(word, sha256=text) for word, text in hashes.items() if text]
    parents = []
    for position, (role, entry) in enumerate(models.items()):
        sha256 = hashes[_ORDINALS[position]] if position < len(_ORDINALS) else ""
        parents.append(_parent(str(role), entry, sha256))
    for key in ("adapters", "loras"):
        adapters = recipe.get(key)
        if isinstance(adapters, dict):
            parents += [_parent(str(role), entry, "") for role, entry in adapters.items()]
        elif isinstance(adapters, list):
            parents += [_parent("adapter", entry, "") for entry in adapters]
    return parents


def _parent(role: str, entry: object, sha256: str) -> _Parent:
    if isinstance(entry, dict):
        found = _text(entry.get("sha256")) or sha256
        return _Parent(_short(role), _text(entry.get("path")), found)
    return _Parent(_short(role), _text(entry), sha256)


def _how(recipe: Mapping[str, object]) -> str:
    """A recipe in one line: "A + (B - C) * M, M = 0.7", "Weighted sum, multiplier 0.3"."""
    formula = _text(recipe.get("merge"))
    if formula:
        params = recipe.get("params")
        items = params.items() if isinstance(params, dict) else ()
        return _short(", ".join([formula, *(f"{key} = {_param(value)}" for key, value in items)]))
    method = _text(recipe.get("interp_method")) or _text(recipe.get("type")) or "merged"
    multiplier = recipe.get("multiplier")
    if isinstance(multiplier, dict):
        numbers = [f"{key} = {_text(value)}" for key, value in multiplier.items()]
        return _short(", ".join([method, *numbers]))
    shown = _text(multiplier)
    return f"{method}, multiplier {shown}" if shown else method


def _param(value: object) -> str:
    if isinstance(value, dict):
        if list(value) == ["default"]:
            return _text(value["default"])
        return "{" + ", ".join(f"{key}: {_text(each)}" for key, each in value.items()) + "}"
    return _text(value)


def _text(value: object) -> str:
    """A bounded text of a scalar, or of a list of them; "" for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(_text(each) for each in value[:32]) + "]"
    return _short(str(value)) if isinstance(value, str | int) else "…"
