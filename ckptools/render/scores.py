"""How well pictures fit words and each other, by a CLIP model in a folder of the user's.

    scorer = load_scorer(Path("clip-vit-large-patch14"))
    likeness(embed_pictures(scorer, [picture])[0], embed_texts(scorer, ["a red circle"])[0])

The folder is what transformers' `CLIPModel.save_pretrained` writes, or a copy of one on the Hub.
Nothing is fetched, and no torchvision is needed: pictures are scaled, cut and normalised here.
Scores are information; nothing here judges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ckptools.checkpoint import Checkpoint, open_safetensors
from ckptools.errors import InputError, counted
from ckptools.evaluation import torch_dtype
from ckptools.pickles import is_pickle, open_pickle
from ckptools.render.loader import choose_device
from ckptools.render.prompts import Tokenizer, clip_tokenizer, read_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Unit = NDArray[np.float64]

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_PUBLIC_WORDS = 49408  # the vocabulary of OpenAI's CLIP and of OpenCLIP's
_FIX = "give a folder such as CLIPModel.save_pretrained writes: config.json, model.safetensors …"
_AT_ONCE = 8
# Of OpenAI's CLIP, for folders that do not say: openai/CLIP, clip.py, `_transform`
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3


@dataclass(frozen=True)
class Lens:
    """How a picture is made to fit the model.

    shortest   its shorter side is scaled to this; 0: it is scaled to `size`, whatever its shape
    size       (width, height) that is then cut out of its middle
    resample   Pillow's number of the filter
    mean, std  of each channel, 0 to 1
    """

    shortest: int
    size: tuple[int, int]
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Scorer:
    """A resident CLIP model, in F32.

    name     the folder's
    weights  the file that it was read from
    """

    name: str
    weights: Path
    model: Any
    tokenizer: Tokenizer
    lens: Lens
    device: torch.device

    @property
    def longest(self) -> int:
        """Tokens of a text that are read; what goes beyond is cut off."""
        return int(self.model.config.text_config.max_position_embeddings) - 2


def check_scorer(folder: Path) -> None:
    """Find out that a folder holds a whole CLIP model; reads no weights.

    Raises `InputError` where it does not.
    """
    with _opened(folder) as weights:
        _hollow(folder, weights)
    _words(folder)
    _lens(folder, 0)


def load_scorer(folder: Path, *, device: str = "auto") -> Scorer:
    """The CLIP model of a folder, resident; strictly: every tensor is there, or `InputError`."""
    place = choose_device(device)
    with _opened(folder) as weights:
        model = _hollow(folder, weights)
        state = {name: _tensor(weights, name) for name in model.state_dict()}
        model.load_state_dict(state, strict=True, assign=True)
        path = weights.path
    for part, buffers in [(part, part.named_buffers(recurse=False)) for part in model.modules()]:
        for name, buffer in list(buffers):  # not saved: CLIP counts its positions
            if name != "position_ids":
                raise TypeError(f"no value is known for {name!r}")
            setattr(part, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    model.requires_grad_(False).eval().to(place)
    lens = _lens(folder, int(model.config.vision_config.image_size))
    return Scorer(folder.resolve().name, path, model, _words(folder), lens, place)


@torch.no_grad()
def embed_texts(scorer: Scorer, texts: Sequence[str]) -> Unit:
    """(texts, width), each of length 1. A text of more tokens than `longest` is cut off."""
    words, rows = scorer.tokenizer, []
    for text in texts:
        ids = words.ids(text)[: scorer.longest]
        rest = scorer.longest - len(ids)
        rows.append([words.start, *ids, words.end, *[words.pad] * rest])
    inputs = torch.tensor(rows, device=scorer.device)
    seen = scorer.model.text_model(input_ids=inputs).pooler_output
    return _unit(scorer.model.text_projection(seen))


@torch.no_grad()
def embed_pictures(scorer: Scorer, pictures: Sequence[NDArray[np.uint8]]) -> Unit:
    """(pictures, width), each of length 1, of pictures (height, width, 3) uint8 of any size."""
    found = []
    for first in range(0, len(pictures), _AT_ONCE):
        values = np.stack([fit_picture(p, scorer.lens) for p in pictures[first : first + _AT_ONCE]])
        seen = scorer.model.vision_model(pixel_values=torch.from_numpy(values).to(scorer.device))
        found.append(_unit(scorer.model.visual_projection(seen.pooler_output)))
    return np.concatenate(found)


def likeness(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """100 * cosine of two embeddings: of a picture and a text, the CLIPScore.

    Source: Hessel et al. 2021, arXiv 2104.08718, equation 1, with w = 100 and no cut at 0.
    """
    return 100 * float(one @ other)


def fit_picture(picture: NDArray[np.uint8], lens: Lens) -> NDArray[np.float32]:
    """(3, height, width) F32 as the model reads it.

    Source of the steps: transformers 5.23, image_processing_pil_clip.py, image_transforms.py.
    """
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture))
    wanted = lens.size
    if lens.shortest:
        short, long = sorted(image.size)
        longer = int(lens.shortest * long / short)
        is_tall = image.width <= image.height
        wanted = (lens.shortest, longer) if is_tall else (longer, lens.shortest)
    scaled = image.resize(wanted, Image.Resampling(lens.resample))
    left, top = (scaled.width - lens.size[0]) // 2, (scaled.height - lens.size[1]) // 2
    cut = scaled.crop((left, top, left + lens.size[0], top + lens.size[1]))
    values = (np.asarray(cut, np.float64) / 255 - lens.mean) / lens.std
    return np.asarray(values.transpose(2, 0, 1), np.float32)


def _unit(rows: torch.Tensor) -> Unit:
    return np.asarray(torch.nn.functional.normalize(rows.double(), dim=-1).cpu().numpy())


# --- the folder ---------------------------------------------------------------------------------


def _opened(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        what = "a file, not a CLIP model's folder" if folder.exists() else "there is no such folder"
        raise InputError(what, where=str(folder), fix=_FIX)
    kind = _json(folder / "config.json").get("model_type")
    if kind != "clip":
        said = f"its config.json says {kind!r}" if kind else "it has no config.json"
        raise InputError(f"not a CLIP model of transformers: {said}", where=str(folder), fix=_FIX)
    there = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not there:
        what = f"a CLIP model without weights: none of {', '.join(_WEIGHTS)}"
        raise InputError(what, where=str(folder), fix=_FIX)
    return open_pickle(there[0]) if is_pickle(there[0]) else open_safetensors(there[0])


def _hollow(folder: Path, weights: Checkpoint) -> Any:
    """The model on the meta device, all of whose tensors are known to be in the file."""
    from huggingface_hub.errors import StrictDataclassError  # of transformers 5's configs
    from transformers import CLIPConfig, CLIPModel

    try:
        config = CLIPConfig.from_dict(_json(folder / "config.json"))
        with torch.device("meta"):
            model = CLIPModel(config)
    except (
        AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, StrictDataclassError,
    ) as exc:  # fmt: skip
        raise InputError(
            f"no CLIP model can be built: {str(exc).splitlines()[-1].strip()}",
            where=str(folder / "config.json"),
            fix=_FIX,
        ) from exc
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in wanted if name not in weights]
    if missing:
        what = f"a CLIP model without {missing[0]!r}"
        more = f" and {counted(len(missing) - 1, 'more tensor')}" if len(missing) > 1 else ""
        raise InputError(what + more, where=str(weights.path), fix=_FIX)
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise InputError(
                f"{name!r} is {list(weights[name].shape)}, config.json says {list(shape)}",
                where=str(weights.path),
                fix="take config.json and weights from one place",
            )
    return model


def _tensor(weights: Checkpoint, name: str) -> torch.Tensor:
    spec = weights[name]
    data = bytearray(spec.nbytes)
    weights.read_into(name, memoryview(data))
    stored = torch.frombuffer(data, dtype=torch_dtype(spec.dtype))
    return stored.reshape(spec.shape).float()


def _words(folder: Path) -> Tokenizer:
    """The folder's tokenizer, or the public one where the folder has none and it fits."""
    found = read_tokenizer(folder)
    if found is not None:
        return found
    text = _json(folder / "config.json").get("text_config")
    words = text.get("vocab_size", _PUBLIC_WORDS) if isinstance(text, Mapping) else _PUBLIC_WORDS
    if words != _PUBLIC_WORDS:
        raise InputError(
            f"a CLIP model of {words:,} words without its tokenizer",
            where=str(folder),
            fix="put its tokenizer.json, or vocab.json and merges.txt, beside config.json",
        )
    return clip_tokenizer()


def _lens(folder: Path, side: int) -> Lens:
    """What preprocessor_config.json says; else OpenAI's, for pictures of `side` pixels."""
    said = _json(folder / "preprocessor_config.json")
    if not said:
        whole = _json(folder / "processor_config.json").get("image_processor")
        said = whole if isinstance(whole, dict) else {}
    try:
        size, cut = said.get("size", side), said.get("crop_size", side)
        width, height = _sides(cut)
        if isinstance(size, Mapping) and "shortest_edge" not in size:
            width, height = _sides(size)
            shortest = 0
        else:
            shortest = int(size["shortest_edge"]) if isinstance(size, Mapping) else int(size)
        mean = tuple(float(number) for number in said.get("image_mean", _MEAN))
        std = tuple(float(number) for number in said.get("image_std", _STD))
        return Lens(shortest, (width, height), int(said.get("resample", _BICUBIC)), mean, std)
    except (KeyError, TypeError, ValueError) as exc:
        raise InputError(
            f"its preprocessor_config.json cannot be read: {exc}", where=str(folder), fix=_FIX
        ) from exc


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return int(size["width"]), int(size["height"])
    return int(size), int(size)


def _json(path: Path) -> dict[str, Any]:
    """A file's mapping; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InputError(f"not JSON: {exc}", where=str(path), fix=_FIX) from exc
    if not isinstance(found, dict):
        raise InputError("not a mapping in JSON", where=str(path), fix=_FIX)
    return found
