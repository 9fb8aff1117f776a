"""What a merge says about itself: metadata inside the file, and the manifest beside it.

Deterministic (no dates, no host) and private: no path of the user's machine, only file names.
Must not know how tensors are computed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

from ckptools.checkpoint import Checkpoint, open_file
from ckptools.hubref import is_hub_text
from ckptools.opening import Source
from ckptools.plan import Plan
from ckptools.recipe import ParamRef, Recipe, lora_weight
from ckptools.tensors import RECIPE_DTYPES
from ckptools.writer import MANIFEST_SCHEMA, Layout

HASH_KEY = "modelspec.hash_sha256"
HASH_PLACEHOLDER = "0x" + "0" * 64
_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"

# About the base's own file, and untrue of what is made from it.
_STALE = {
    HASH_KEY, "modelspec.title", "modelspec.date", "modelspec.thumbnail", "modelspec.merged_from",
    "modelspec.architecture", "modelspec.implementation", "modelspec.sai_model_spec",
    "modelspec.resolution", "sd_merge_recipe", "sd_merge_models", "sshs_model_hash",
    "sshs_legacy_hash", "ckptools.recipe", "ckptools.version",
}  # fmt: skip
_LOCAL_PATH = re.compile(
    r"\bfile:/|(?<![\w.~/+-])(?:/{1,2}[\w.~-]+/[^\s\"']|~\w*/|[a-z]:[\\/]|\\\\\w)", re.IGNORECASE
)
_WEB = re.compile(r"\b(?!file:)[a-z][a-z0-9+.-]*://[^\s\"']*", re.IGNORECASE)


@dataclass(frozen=True)
class Embedded:
    """Metadata for the output's header, and what was left out of it."""

    entries: Mapping[str, str]
    notes: tuple[str, ...]


def names_local_path(text: str) -> bool:
    """Whether a text holds a path of somebody's machine (web addresses are not)."""
    return bool(_LOCAL_PATH.search(without_addresses(text)))


def without_addresses(text: str) -> str:
    """A text without its web addresses, and models on the Hub."""
    return _WEB.sub(" ", text.replace("\\/", "/"))  # JSON may write \/


def legacy_hash(checkpoint: Checkpoint) -> str:
    """The web UI's short "legacy hash" of a single file: 64 KiB at 1 MiB, first 8 digits.

    Source: AUTOMATIC1111 web UI, `sd_models.model_hash`.
    """
    file = checkpoint.files[0]
    length = max(0, min(0x10000, file.header.file_bytes - 0x100000))
    with open_file(file.path) as stream:
        return hashlib.sha256(stream.read(length, 0x100000)).hexdigest()[:8]


# --- the recipe, as plain data -----------------------------------------------------------------


def canonical_recipe(plan: Plan, sha256s: Mapping[str, str]) -> dict[str, object]:
    """The recipe as data that reads as a recipe again; files by name, never by path.

    sha256s  model name -> sha256 of its file, where known
    """
    recipe = plan.recipe
    weights = {name: lora_weight(name) for name in recipe.loras}
    models: dict[str, object] = {}
    loras: list[object] = []
    for source in plan.sources:
        entry = _file_entry(source, sha256s)
        if source.name in weights:
            loras.append(entry | {"weight": _lines(recipe.params[weights[source.name]])})
        else:
            models[source.name] = entry
    document: dict[str, object] = {"ckptools": 1, "models": models, **written_formula(recipe)}
    document["base"] = recipe.base
    if loras:
        document["loras"] = loras
    if recipe.take:
        document["take"] = {component: model for component, (model, _) in recipe.take.items()}
    names = {"keep": "keep"} | {dtype: name for name, dtype in RECIPE_DTYPES.items()}
    output: dict[str, object] = {
        "path": recipe.output_path.name,
        "dtype": {part: names[dtype] for part, dtype in recipe.output.dtypes.items()},
    }
    if recipe.output.shard_bytes:
        output["shard_size"] = recipe.output.shard_bytes
    if recipe.output.metadata:
        output["metadata"] = dict(recipe.output.metadata)
    document["output"] = output
    if recipe.allow_nonfinite:
        document["allow_nonfinite"] = True
    if recipe.seed:
        document["seed"] = recipe.seed
    if recipe.compat:
        document["compat"] = recipe.compat
    return document


def written_formula(recipe: Recipe) -> dict[str, object]:
    """`params`, `let` and `merge` of a recipe, as `canonical_recipe` has them."""
    weights = {lora_weight(name) for name in recipe.loras}
    params = {ref.name: _lines(ref) for ref in recipe.params.values() if ref.name not in weights}
    lets = {name: formula.text.strip() for name, formula in recipe.lets.items()}
    return {
        **({"params": params} if params else {}),
        **({"let": lets} if lets else {}),
        "merge": recipe.merge.text.strip(),
    }


def merge_id(recipe: Mapping[str, Any], inputs: Sequence[tuple[str, str]]) -> str:
    """A merge before it has bytes: sha256 of its recipe as data, pins left out, and its inputs.

    recipe  as `canonical_recipe` has it
    inputs  (name, sha256 of its headers) of every model, in order
    """

    def unpinned(entry: object) -> object:
        if not isinstance(entry, Mapping):
            return entry
        return {key: value for key, value in entry.items() if key != "sha256"}

    models = {name: unpinned(entry) for name, entry in recipe.get("models", {}).items()}
    loras = [unpinned(entry) for entry in recipe.get("loras", [])]
    document = {**recipe, "models": models, "loras": loras, "inputs": [list(one) for one in inputs]}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def planned_id(plan: Plan) -> str:
    """The `merge_id` of what a plan would write."""
    inputs = [(source.name, source.checkpoint.header_sha256) for source in plan.sources]
    return merge_id(canonical_recipe(plan, {}), inputs)


def _file_entry(source: Source, sha256s: Mapping[str, str]) -> dict[str, object]:
    is_remote = is_hub_text(source.ref.path)  # with its commit: the workflow pins what it fetches
    entry: dict[str, object] = {"path": source.ref.path if is_remote else source.label}
    if source.name in sha256s:
        entry["sha256"] = sha256s[source.name]
    if source.ref.allow_unmatched:
        entry["allow_unmatched"] = True
    if source.ref.dora != "trained":
        entry["dora"] = source.ref.dora
    return entry


# The keys of PEFT's config that a change depends on, or that say what was trained.
_CONFIG_KEYS = (
    "peft_type", "r", "lora_alpha", "alpha", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern", "target_modules", "feedforward_modules", "use_cayley_neumann",
    "num_cayley_neumann_terms", "coft", "eps", "block_share",
)  # fmt: skip


def _config_entry(source: Source) -> dict[str, object]:
    """What counts of the adapter_config.json beside an adapter: another file, that may be lost."""
    told = {
        key: source.config[key]
        for key in _CONFIG_KEYS
        if key in source.config and _is_public_json(source.config[key])
    }
    return {"adapter_config": told} if told else {}


def _is_public_json(value: object) -> bool:
    try:
        return not names_local_path(_compact(value))
    except ValueError:  # NaN and Infinity, which Python reads
        return False


def _lines(ref: ParamRef) -> dict[str, object]:
    mbw: dict[str, object] = {"mbw": list(ref.mbw)} if ref.mbw else {}
    return mbw | {line.selector: line.value for line in ref.lines}


# --- inside the file ---------------------------------------------------------------------------


def embedded_metadata(plan: Plan, sha256s: Mapping[str, str]) -> Embedded:
    """The output's `__metadata__`: the base's, our recipe, ModelSpec, and the web UI's keys.

    Sources: ModelSpec 1.0.1 (Stability-AI/ModelSpec); AUTOMATIC1111 web UI, `extras.py`
    (`sd_merge_recipe`, `sd_merge_models`).
    """
    entries: dict[str, str] = {}
    notes: list[str] = []
    public = _public(plan.base)
    for key in plan.base.checkpoint.metadata:
        if key in _STALE:
            continue
        if key in public:
            entries[key] = public[key]
        else:
            notes.append(f"metadata {key!r} of {plan.base.name} names a local path and is left out")
    entries |= _model_spec(plan)
    recipe = _compact(canonical_recipe(plan, sha256s))
    entries |= {
        "format": "pt",
        "ckptools.recipe": recipe,
        "ckptools.version": version(),
        "sd_merge_recipe": _compact(_web_ui_recipe(plan, sha256s)),
        "sd_merge_models": _compact(_web_ui_models(plan, sha256s)),
    }
    entries |= plan.recipe.output.metadata
    entries[HASH_KEY] = HASH_PLACEHOLDER
    return Embedded(entries, tuple(notes))


def _model_spec(plan: Plan) -> dict[str, str]:
    prediction = plan.base.detection.prediction
    architecture = plan.family.architecture(plan.variant, prediction)
    carried = _public(plan.base)
    resolution = carried.get("modelspec.resolution") or plan.family.resolution(
        plan.variant, prediction
    )
    entries = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture or "unknown",
        "modelspec.implementation": carried.get("modelspec.implementation", _IMPLEMENTATION),
        "modelspec.title": plan.recipe.output_path.stem,
        "modelspec.merged_from": ", ".join(
            _public(source).get("modelspec.title") or Path(source.label).stem
            for source in plan.sources
        ),
    }
    if resolution:
        entries["modelspec.resolution"] = resolution
    if prediction in ("epsilon", "v"):
        entries["modelspec.prediction_type"] = prediction
    return entries


def _public(source: Source) -> dict[str, str]:
    """A source's metadata without the entries that name a local path."""
    return {
        key: value
        for key, value in source.checkpoint.metadata.items()
        if not names_local_path(key) and not names_local_path(value)
    }


def _web_ui_recipe(plan: Plan, sha256s: Mapping[str, str]) -> dict[str, object]:
    models = [source for source in plan.sources if source.adapter is None]
    hashes = [sha256s.get(source.name) for source in models]
    ordinal = ("primary", "secondary", "tertiary")
    document: dict[str, object] = {
        "type": "ckptools",
        "interp_method": plan.recipe.merge.text.strip(),
        "models": {source.name: source.label for source in models},
        "multiplier": {
            ref.name: ref.lines[0].value if len(ref.lines) == 1 and not ref.mbw else "per tensor"
            for ref in plan.recipe.params.values()
        },
        "custom_name": plan.recipe.output_path.stem,
        "is_inpainting": plan.variant == "inpainting",
        "is_instruct_pix2pix": plan.variant == "ip2p",
    }
    adapters = {s.name: s.label for s in plan.sources if s.adapter is not None}
    if adapters:
        document["adapters"] = adapters
    for word, sha256 in zip(ordinal, hashes, strict=False):
        document[f"{word}_model_hash"] = sha256
    return document


def _web_ui_models(plan: Plan, sha256s: Mapping[str, str]) -> dict[str, object]:
    """The parents, and their parents as far as their own metadata tells."""
    models: dict[str, object] = {}
    for source in plan.sources:
        key = sha256s.get(source.name) or f"header:{source.checkpoint.header_sha256}"
        models[key] = {
            "name": source.label,
            "legacy_hash": legacy_hash(source.checkpoint),
            "sd_merge_recipe": _own_json(source, "sd_merge_recipe"),
        }
        ancestors = _own_json(source, "sd_merge_models")
        if isinstance(ancestors, dict):
            models = ancestors | models
    return models


def _own_json(source: Source, key: str) -> object:
    """A JSON entry of a source's metadata; None where it is absent, broken, or names a path."""
    try:
        parsed: object = json.loads(source.checkpoint.metadata.get(key, ""))
        text = _compact(parsed)
        text.encode()  # escapes can spell what UTF-8 cannot hold
    except (ValueError, RecursionError):
        return None
    return None if names_local_path(text) else parsed


def _compact(document: object) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def with_hash(layout: Layout, sha256: str) -> Layout:
    """The layout with the data's hash in place of the placeholder; nothing moves."""
    before = f'"{HASH_KEY}":"{HASH_PLACEHOLDER}"'.encode()
    after = f'"{HASH_KEY}":"0x{sha256}"'.encode()
    header = layout.header.replace(before, after)
    return Layout(layout.path, layout.specs, layout.starts, header, layout.file_bytes)


# --- beside the file ---------------------------------------------------------------------------


def manifest_document(
    plan: Plan,
    layouts: Sequence[Layout],
    *,
    sha256s: Mapping[str, str],
    data_sha256s: Sequence[str],
    verified: Mapping[str, object],
    notes: Sequence[str],
) -> bytes:
    """The manifest: recipe, inputs, outputs, versions and notes, as JSON text.

    data_sha256s  sha256 of each output's data section, in the order of `layouts`
    """
    document = {
        "schema": MANIFEST_SCHEMA,
        "recipe": canonical_recipe(plan, sha256s),
        "inputs": [
            {
                "name": source.name,
                "file": source.label,
                "bytes": source.checkpoint.file_bytes,
                "header_sha256": source.checkpoint.header_sha256,
                "sha256": sha256s.get(source.name),
                "family": source.detection.family,
                "variant": source.detection.variant,
                "license": _public(source).get("modelspec.license"),
            }
            | _config_entry(source)
            for source in plan.sources
        ],
        "outputs": [
            {
                "file": layout.path.name,
                "bytes": layout.file_bytes,
                "sha256_data": data,
                "header_sha256": hashlib.sha256(layout.header).hexdigest(),
            }
            for layout, data in zip(layouts, data_sha256s, strict=True)
        ],
        "tensors": plan.counts,
        "verified": dict(verified),
        "versions": versions(),
        "warnings": _without_folder(plan.warnings, plan.recipe.path),
        "notes": _without_folder([*plan.notes, *notes], plan.recipe.path),
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _without_folder(texts: Sequence[str], recipe: Path) -> list[str]:
    """Texts that name lines of the recipe, by its name instead of its path."""
    return [text.replace(str(recipe), recipe.name) for text in texts]


def version() -> str:
    """The installed version of ckptools."""
    return package_metadata.version("ckptools")


def versions() -> dict[str, str]:
    """The versions that the bytes of a merge depend on."""
    found = {"ckptools": version(), "python": platform.python_version()}
    return found | {name: package_metadata.version(name) for name in ("numpy", "torch")}
