"""Prompts into what the UNet reads: tokens, attention weights, clip skip, chunks.

We encode prompts ourselves: with transformers 5.6 and later, diffusers 0.42's own clip skip fails
(huggingface/diffusers issue 14124), and its pipelines cut prompts off at 77 tokens.

    a prompt of any length     is read in chunks of 75 words, each between a start and an end, and
                               their states are put one behind the other
    (text:1.3) (text) [text]   weigh 1.3, 1.1 and 1/1.1, nested ones multiply; \\( \\) \\[ \\] are
                               plain brackets. A token's states are multiplied by its weight, then
                               all states so that their mean is what it was: as AUTOMATIC1111's
                               "Original" emphasis does (its wiki, Features, "Attention/emphasis")
    clip skip n                the text encoder is read n - 1 layers before where the model usually
                               reads it; 1 is what the model was trained with
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptools.errors import InputError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine
    from torch import Tensor

    from ckptools.render.loader import Pipeline

_MERGES = Path(__file__).parent / "data" / "clip_merges.txt.gz"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_EMPHASIS = 1.1


# --- tokens -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """CLIP's byte pair encoding.

    words            size of the vocabulary
    start, end, pad  ids around a text, and after its end
    """

    engine: Engine
    words: int
    start: int
    end: int
    pad: int

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without start and end, however long it is."""
        return list(self.engine.encode(text, add_special_tokens=False).ids)


@cache
def clip_tokenizer(pad: str = _END) -> Tokenizer:
    """The tokenizer of every public CLIP text encoder: SD1, SD2, SDXL.

    pad  the word after a text's end: SD2 and SDXL's second encoder take "!"

    Only the merges are shipped; the vocabulary is bytes, bytes at a word's end, merges, start, end.
    Source: openai/CLIP, simple_tokenizer.py (MIT; see data/CLIP-LICENSE).
    """
    vocabulary, merges = clip_words()
    return _tokenizer(_engine(vocabulary, merges), pad)


def clip_words() -> tuple[dict[str, int], list[str]]:
    """CLIP's vocabulary, word → number, and the merges that make its words."""
    merges = gzip.decompress(_MERGES.read_bytes()).decode().splitlines()
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in merges]
    vocabulary = {word: number for number, word in enumerate([*words, _START, _END])}
    return vocabulary, merges


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The CLIP tokenizer of a diffusers folder, None where it has none.

    Reads `tokenizer.json`, or `vocab.json` with `merges.txt`; the padding word is that of
    `special_tokens_map.json` or `tokenizer_config.json`.
    """
    from tokenizers import Tokenizer as Engine

    vocabulary, merges, whole = (
        folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json")
    )
    try:
        if vocabulary.is_file() and merges.is_file():
            lines = merges.read_text(encoding="utf-8").splitlines()
            pairs = [line for line in lines if line and not line.startswith("#version")]
            engine = _engine(json.loads(vocabulary.read_text(encoding="utf-8")), pairs)
        elif whole.is_file():
            engine = Engine.from_file(str(whole))
        else:
            return None
        return _tokenizer(engine, _pad_word(folder))
    except Exception as exc:  # tokenizers raises no class of its own
        raise InputError(f"not a CLIP tokenizer: {exc}", where=str(folder)) from exc


def _pad_word(folder: Path) -> str:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            word = json.loads(path.read_text(encoding="utf-8")).get("pad_token")
            word = word.get("content") if isinstance(word, dict) else word
            if word:
                return str(word)
    return _END


def _tokenizer(engine: Engine, pad: str) -> Tokenizer:
    def number(word: str) -> int:
        found = engine.token_to_id(word)
        if found is None:
            raise ValueError(f"no word {word!r}")
        return found

    return Tokenizer(engine, engine.get_vocab_size(), number(_START), number(_END), number(pad))


def _engine(vocabulary: dict[str, int], merges: Sequence[str]) -> Engine:
    """Source of the steps: openai/CLIP, simple_tokenizer.py, `SimpleTokenizer.pat`, `encode`."""
    from tokenizers import Regex, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    engine = Engine(
        models.BPE(
            vocab=vocabulary,
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=_END,
        )
    )
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    engine.add_special_tokens([_START, _END])
    return engine


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the vocabulary's order.

    Source: openai/gpt-2, encoder.py, `bytes_to_unicode`: printable bytes are themselves and come
    first, the others take the letters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + number) for number in range(len(others)))]


# --- attention weights --------------------------------------------------------------------------


_MARK = re.compile(
    r"\\[()\[\]\\]|\(|\[|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\)|\]|[^\\()\[\]:]+|[\\:]"
)


def weigh(prompt: str) -> list[tuple[str, float]]:
    """The texts of a prompt with their weights, in order.

    >>> weigh("a (red:1.5) cat")
    [('a ', 1.0), ('red', 1.5), (' cat', 1.0)]

    An unclosed bracket reaches to the end; one that closes nothing is plain text.
    """
    texts: list[tuple[str, float]] = []
    open_at: list[tuple[str, int]] = []

    def multiply(start: int, factor: float) -> None:
        texts[start:] = [(text, weight * factor) for text, weight in texts[start:]]

    for mark in _MARK.finditer(prompt):
        text, number = mark[0], mark[1]
        kind = open_at[-1][0] if open_at else ""
        if text in ("(", "["):
            open_at.append((text, len(texts)))
        elif text.startswith("\\") and len(text) == 2:
            texts.append((text[1], 1.0))
        elif kind == "(" and (number is not None or text == ")"):
            multiply(open_at.pop()[1], float(number) if number is not None else _EMPHASIS)
        elif kind == "[" and text == "]":
            multiply(open_at.pop()[1], 1 / _EMPHASIS)
        else:
            texts.append((text, 1.0))
    for text, start in reversed(open_at):
        multiply(start, _EMPHASIS if text == "(" else 1 / _EMPHASIS)
    return list(_joined(texts))


def _joined(texts: Sequence[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Neighbours of equal weight are one text: a word cut in two would be other tokens."""
    gathered, weight = "", 1.0
    for text, its in texts:
        if its != weight and gathered:
            yield gathered, weight
            gathered = ""
        gathered, weight = gathered + text, its
    if gathered:
        yield gathered, weight


# --- states -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with what it reads.

    module       a CLIP text model of transformers
    layers_back  how far before its last layer the model reads it
    """

    component: str
    module: Any
    tokenizer: Tokenizer
    layers_back: int


@dataclass(frozen=True)
class Conditioning:
    """What the UNet reads of a prompt and of a negative prompt.

    positive, negative                (1, 77 * chunks, width)
    positive_pooled, negative_pooled  (1, width of the second encoder); None without one
    tokens                            of the prompt, by the longest count of its encoders
    """

    positive: Tensor
    negative: Tensor
    positive_pooled: Tensor | None
    negative_pooled: Tensor | None
    tokens: int
    chunks: int


def encode(
    pipeline: Pipeline, prompt: str, negative: str = "", *, clip_skip: int = 1
) -> Conditioning:
    """A prompt and its negative, read by all text encoders of a pipeline, side by side.

    Both get as many chunks as the longer one needs. Pooled states are those of the first chunk.
    Source of the layers: Stability-AI/generative-models, configs/inference/sd_xl_base.yaml.
    """
    import torch

    encoders = pipeline.text_encoders
    texts = [
        [_weighted_ids(each.tokenizer, text) for each in encoders] for text in (prompt, negative)
    ]
    per_chunk = encoders[0].module.config.max_position_embeddings - 2
    longest = max(len(ids) for side in texts for ids, _ in side)
    chunks = max(1, -(-longest // per_chunk))
    states, pooled = [], []
    for side in texts:
        read = [
            _read(each, ids, weights, chunks, clip_skip)
            for each, (ids, weights) in zip(encoders, side, strict=True)
        ]
        states.append(
            torch.cat([state.to(pipeline.device, pipeline.dtype) for state, _ in read], dim=-1)
        )
        pooled.append(
            None if read[-1][1] is None else read[-1][1].to(pipeline.device, pipeline.dtype)
        )
    if pipeline.blueprint.facts.zero_empty_negative and not negative:
        states[1] = torch.zeros_like(states[0])
        pooled[1] = None if pooled[0] is None else torch.zeros_like(pooled[0])
    tokens = max(len(ids) for ids, _ in texts[0])
    return Conditioning(states[0], states[1], pooled[0], pooled[1], tokens, chunks)


def _weighted_ids(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in weigh(prompt):
        found = tokenizer.ids(text)
        ids += found
        weights += [weight] * len(found)
    return ids, weights


def _read(
    encoder: TextEncoder, ids: Sequence[int], weights: Sequence[float], chunks: int, clip_skip: int
) -> tuple[Tensor, Tensor | None]:
    """States (1, chunks * length, width) and the first chunk's pooled state, if there is one."""
    import torch

    module, words = encoder.module, encoder.tokenizer
    per_chunk = module.config.max_position_embeddings - 2
    back = encoder.layers_back + clip_skip - 1
    if clip_skip < 1 or back >= module.config.num_hidden_layers:
        most = module.config.num_hidden_layers - encoder.layers_back
        raise UsageError(f"no clip skip {clip_skip}", fix=f"a whole number from 1 to {most}")
    rows, factors = [], []
    for start in range(0, chunks * per_chunk, per_chunk):
        part = list(ids[start : start + per_chunk])
        rest = per_chunk - len(part)
        rows.append([words.start, *part, words.end, *[words.pad] * rest])
        factors.append([1.0, *weights[start : start + per_chunk], *[1.0] * (rest + 1)])
    device = next(module.parameters()).device
    with torch.no_grad():
        out = module(torch.tensor(rows, device=device), output_hidden_states=back > 0)
        states = out.hidden_states[-1 - back] if back else out.last_hidden_state
        if back and not encoder.layers_back:
            norms = [m for name, m in module.named_modules() if name.endswith("final_layer_norm")]
            states = norms[0](states)
    if any(weight != 1.0 for weight in weights):
        wide = states.float()
        weighed = wide * torch.tensor(factors, device=device).unsqueeze(-1)
        states = (weighed * (wide.mean() / weighed.mean())).to(states.dtype)
    pooled = getattr(out, "text_embeds", None)
    return states.reshape(1, -1, states.shape[-1]), None if pooled is None else pooled[:1]
