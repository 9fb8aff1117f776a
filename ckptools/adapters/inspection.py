"""`lora inspect`: what an adapter file is, from its header and its alphas. Loads no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ckptools.adapters.reading import Adapter, component_names, kind_title, open_adapter
from ckptools.progress import Progress

# What trainers write as `ss_base_model_version`, by how it starts.
_TOLD_FAMILIES = (
    ("sd_v1", "sd1"),
    ("sd_v2", "sd2"),
    ("sdxl", "sdxl"),
    ("sd3", "sd3"),
    ("flux", "flux"),
)

N = TypeVar("N", int, float)

TRAINING_KEYS = (
    "ss_base_model_version", "ss_sd_model_name", "ss_v2", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_network_args", "ss_optimizer", "ss_learning_rate", "ss_unet_lr",
    "ss_text_encoder_lr", "ss_lr_scheduler", "ss_num_train_images", "ss_num_epochs", "ss_epoch",
    "ss_steps", "ss_max_train_steps", "ss_resolution", "ss_clip_skip", "ss_noise_offset",
    "ss_training_comment", "ss_output_name",
)  # fmt: skip
_TRIGGER_KEYS = ("modelspec.trigger_phrase", "trigger_word", "trigger_words", "activation text")
_TEXT_MARKS = ("text_model", "self_attn_q_proj", "mlp_fc")


@dataclass(frozen=True)
class Component:
    """What an adapter holds for one component of a model."""

    modules: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Inspection:
    """What an adapter file is.

    kinds       title → modules
    scheme      how names are written; layout: as `family.detect` calls it
    base        families it was made for, each with the fact that says so
    ranks, alphas, scales  number → modules
    triggers    trigger phrases its author wrote into the metadata
    tags        the captions' most frequent tags, with counts, over all data sets
    training    ss_* metadata worth showing
    modelspec   modelspec.* metadata
    """

    path: Path
    nbytes: int
    tensors: int
    kinds: Mapping[str, int]
    scheme: str
    layout: str
    base: tuple[tuple[str, str], ...]
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    scales: Mapping[float, int]
    components: Mapping[str, Component]
    dtypes: tuple[str, ...]
    triggers: tuple[str, ...]
    tags: tuple[tuple[str, int], ...]
    training: Mapping[str, str]
    modelspec: Mapping[str, str]
    metadata: Mapping[str, str]
    embeddings: tuple[str, ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]


def inspect_adapter(
    path: Path, *, most_tags: int = 20, progress: Progress | None = None
) -> Inspection:
    """What the adapter file is; anything that is not one, or is broken, is an `InputError`."""
    with open_adapter(path, allow_unknown=True, progress=progress) as adapter:
        modules = adapter.file.modules
        metadata = adapter.checkpoint.metadata
        tags, notes = _tags(metadata, most_tags)
        return Inspection(
            path=path,
            nbytes=adapter.checkpoint.file_bytes,
            tensors=len(adapter.checkpoint),
            kinds=dict(Counter(kind_title(m) for m in modules.values()).most_common()),
            scheme=adapter.scheme,
            layout=adapter.detection.layout or "unknown",
            base=tuple((fit.family, fit.reason) for fit in adapter.fits) or _told_base(metadata),
            ranks=_histogram(m.rank for m in modules.values() if m.rank is not None),
            alphas=_histogram(_alphas(adapter)),
            scales=_histogram(round(scale, 6) for scale in adapter.scales.values()),
            components=_components(adapter),
            dtypes=tuple(sorted({spec.dtype for spec in adapter.checkpoint.values()})),
            triggers=_triggers(metadata),
            tags=tags,
            training={key: metadata[key] for key in TRAINING_KEYS if key in metadata},
            modelspec={k: v for k, v in sorted(metadata.items()) if k.startswith("modelspec.")},
            metadata=dict(sorted(metadata.items())),
            embeddings=tuple(adapter.file.embeddings),
            unknown=adapter.file.unknown,
            notes=(*adapter.file.notes, *adapter.checkpoint.warnings, *notes),
        )


def ranks_of(adapter: Adapter) -> dict[int, int]:
    """Rank → how many modules have it."""
    return _histogram(m.rank for m in adapter.file.modules.values() if m.rank is not None)


def _histogram(numbers: Iterable[N]) -> dict[N, int]:
    return dict(sorted(Counter(numbers).items()))


def _alphas(adapter: Adapter) -> list[float]:
    """Every module's alpha: the tensor's, or else the config's."""
    found = []
    for name, module in adapter.file.modules.items():
        alpha = adapter.numbers[name].get("alpha", module.alpha)
        if alpha is not None:
            found.append(round(alpha, 6))
    return found


def component_of(module: str, family: str) -> str:
    """The component that a module's name speaks of; "unknown" where no prefix is known.

    >>> component_of("lora_te1_text_model_encoder_layers_0_mlp_fc1", "sdxl")
    'text_encoder'
    """
    name = module.replace("base_model.model.", "", 1)
    for prefix, component in component_names(family):
        if not name.startswith(prefix):
            continue
        shared = prefix in ("", "lycoris_") and component == "unet"
        if shared and any(mark in name.replace(".", "_") for mark in _TEXT_MARKS):
            return "text_encoder"
        return component
    return "unknown"


def _components(adapter: Adapter) -> dict[str, Component]:
    """Modules and bytes by component, the embeddings' bytes as "embeddings"."""
    family = adapter.fits[0].family if adapter.fits else "sdxl"
    found: dict[str, Component] = {}

    def count(component: str, keys: tuple[str, ...], modules: int) -> None:
        before = found.get(component, Component())
        nbytes = sum(adapter.checkpoint[key].nbytes for key in keys)
        found[component] = Component(before.modules + modules, before.nbytes + nbytes)

    for name, module in adapter.file.modules.items():
        count(component_of(name, family), tuple(module.parts.values()), 1)
    for keys in adapter.file.embeddings.values():
        count("embeddings", keys, 0)
    if adapter.file.unknown:
        count("unknown tensors", adapter.file.unknown, 0)
    return dict(sorted(found.items(), key=lambda item: -item[1].nbytes))


def _triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(metadata[key] for key in _TRIGGER_KEYS if metadata.get(key)))


def _tags(
    metadata: Mapping[str, str], most: int
) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """The most frequent tags of ss_tag_frequency, {data set: {tag: count}}; and what is wrong."""
    text = metadata.get("ss_tag_frequency", "")
    if not text:
        return (), ()
    counts: Counter[str] = Counter()
    try:
        document = json.loads(text)
        for tags in document.values():
            for tag, count in tags.items():
                counts[str(tag).strip()] += int(count)
    except (ValueError, TypeError, AttributeError):
        return (), ("ss_tag_frequency is not what kohya's trainer writes",)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(ordered[:most]), ()


def _told_base(metadata: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The family that a trainer wrote down, for adapters whose names and widths tell none.

    Source: kohya-ss/sd-scripts, `library/train_util.py`, `get_model_version_str_for_sd1_sd2` and
    `library/sdxl_model_util.py`, `MODEL_VERSION_SDXL_BASE_V1_0`.
    """
    told = metadata.get("ss_base_model_version", "")
    for start, family in _TOLD_FAMILIES:
        if told.startswith(start):
            return ((family, f"its metadata says {told}"),)
    return ()
