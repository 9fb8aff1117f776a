"""Prompts: tokens as transformers has them, states as diffusers' pipelines have them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from narrow import TINY, Narrow, byte_letters, narrow_model, write_tokenizer
from torch import Tensor

from ckptools.errors import InputError, UsageError
from ckptools.render import encode, load_pipeline
from ckptools.render.loader import Pipeline
from ckptools.render.prompts import clip_tokenizer, read_tokenizer, weigh

TEXTS = [
    "",
    "a photo of an astronaut riding a horse on mars",
    "Ünïcödé — naïve café, ÆØÅ",
    "新しい絵 картина ελληνικά",
    "🦊🔥 x² ½ 3.14 100%",
    "it's they'll I'd we've 'tis",
    "  two\t\nspaces  and\u00a0hard ones ",
    "masterpiece, best_quality, (detailed:1.2), <lora:x:1>",
    "antidisestablishmentarianism" * 3,
    "a<|endoftext|>b",
    "word " * 200,
]


def theirs(folder: Path) -> object:
    import transformers

    # before 5 the other class, without ftfy, splits Chinese into single characters
    kind = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_pretrained(folder)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_tokens_are_those_of_transformers(tmp_path: Path, pad: str) -> None:
    write_tokenizer(tmp_path / "full", pad, words=49408)
    reference, ours = theirs(tmp_path / "full"), clip_tokenizer(pad)

    assert ours.words == len(reference) == 49408
    assert (ours.start, ours.end) == (49406, 49407)
    assert ours.pad == reference.pad_token_id
    assert [ours.ids(text) for text in TEXTS] == [
        reference(text, add_special_tokens=False)["input_ids"] for text in TEXTS
    ]


def test_known_prompts_have_their_known_tokens() -> None:
    """From openai/CLIP's own notebook: the diagram, the dog and the cat."""
    assert clip_tokenizer().ids("a diagram") == [320, 22697]
    assert clip_tokenizer().ids("a dog") == [320, 1929]
    assert clip_tokenizer().ids("a cat") == [320, 2368]


def test_a_folders_tokenizer_is_read_in_either_form(tmp_path: Path) -> None:
    config = TINY / "config" / "tokenizer"
    reference, ours = theirs(config), read_tokenizer(config)
    assert ours is not None
    whole = tmp_path / "whole"
    whole.mkdir()
    ours.engine.save(str(whole / "tokenizer.json"))
    shutil.copy(config / "tokenizer_config.json", whole)
    again = read_tokenizer(whole)
    assert again is not None

    text = "a red circle on a black background"
    wanted = reference(text, add_special_tokens=False)["input_ids"]
    assert ours.ids(text) == again.ids(text) == wanted
    for tokenizer in (ours, again):
        assert (tokenizer.words, tokenizer.start, tokenizer.end, tokenizer.pad) == (
            681,
            679,
            680,
            680,
        )


def test_a_folder_without_or_with_a_broken_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None
    write_tokenizer(tmp_path / "other", "nosuchword")
    with pytest.raises(InputError, match="no word 'nosuchword'"):
        read_tokenizer(tmp_path / "other")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a CLIP tokenizer"):
        read_tokenizer(tmp_path)


def test_padding_may_be_written_at_length_or_left_out(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a", "!")
    path = tmp_path / "a/special_tokens_map.json"
    path.write_text(json.dumps({"pad_token": {"content": "!", "lstrip": False}}))
    long = read_tokenizer(tmp_path / "a")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / "a" / name).unlink()
    none = read_tokenizer(tmp_path / "a")

    assert long is not None
    assert none is not None
    assert (long.pad, none.pad) == (0, none.end)


def test_byte_letters_begin_the_vocabulary() -> None:
    engine = clip_tokenizer().engine

    assert [engine.id_to_token(number) for number in range(256)] == byte_letters()


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("", []),
        ("plain: text, 1.5", [("plain: text, 1.5", 1.0)]),
        ("a (red:1.5) cat", [("a ", 1.0), ("red", 1.5), (" cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("([red]:2)", [("red", 2 / 1.1)]),
        ("(a (b:0.5) c:2)", [("a ", 2.0), ("b", 1.0), (" c", 2.0)]),
        (r"\(red\) \[x\] \\", [("(red) [x] \\\\"[:-1], 1.0)]),
        ("(red", [("red", 1.1)]),
        ("[red", [("red", 1 / 1.1)]),
        ("red) blue]", [("red) blue]", 1.0)]),
        ("[red:1.5)", [("red:1.5)", 1 / 1.1)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("back\\slash", [("back\\slash", 1.0)]),
    ],
)
def test_weights(prompt: str, wanted: list[tuple[str, float]]) -> None:
    found = weigh(prompt)

    assert [text for text, _ in found] == [text for text, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted])


# --- states -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Narrow, Pipeline]:
    model = narrow_model(tmp_path_factory.mktemp("sdxl"), "sdxl")
    return model, load_pipeline(model.path, config=model.config, device="cpu")


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load_pipeline(TINY / "C.safetensors", device="cpu")


@torch.no_grad()
def layers(module: object, ids: list[int]) -> list[Tensor]:
    """The states after each layer, gathered by hooks; the last is normed."""
    seen: list[Tensor] = []
    found = [m for name, m in module.named_modules() if name.endswith("encoder.layers")]
    hooks = [
        layer.register_forward_hook(
            lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in found[0]
    ]
    last = module(torch.tensor([ids])).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [*seen[:-1], last]


def padded(tokenizer: object, text: str) -> list[int]:
    ids = tokenizer(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
    return list(ids)


def test_states_are_those_of_diffusers_pipeline(sdxl: tuple[Narrow, Pipeline]) -> None:
    """SDXL: two encoders side by side, the second pooled."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    model, pipeline = sdxl
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionXLPipeline(
            vae=pipeline.vae,
            unet=pipeline.unet,
            text_encoder=pipeline.text_encoders[0].module,
            text_encoder_2=pipeline.text_encoders[1].module,
            tokenizer=theirs(model.config / "tokenizer"),
            tokenizer_2=theirs(model.config / "tokenizer_2"),
            scheduler=DDIMScheduler(),
            add_watermarker=False,
        )
        wanted = [pipe.encode_prompt("a red fox", device="cpu", negative_prompt="blurry")]
        wanted.append(pipe.encode_prompt("a red fox", device="cpu"))

    for negative, reference in zip(("blurry", ""), wanted, strict=True):
        found = encode(pipeline, "a red fox", negative)
        states = (found.positive, found.negative, found.positive_pooled, found.negative_pooled)
        for ours, their in zip(states, reference, strict=True):
            assert ours is not None
            assert torch.equal(ours, their)


@pytest.mark.parametrize("clip_skip", [1, 2, 5])
def test_clip_skip_reads_an_earlier_layer(tiny: Pipeline, clip_skip: int) -> None:
    text = "a green star"
    module = tiny.text_encoders[0].module
    reference = layers(module, padded(theirs(TINY / "config" / "tokenizer"), text))
    norm = next(m for n, m in module.named_modules() if n.endswith("final_layer_norm"))
    state = reference[-clip_skip]
    wanted = state if clip_skip == 1 else norm(state)

    assert torch.equal(encode(tiny, text, clip_skip=clip_skip).positive, wanted)


def test_clip_skip_counts_from_where_the_model_reads(sdxl: tuple[Narrow, Pipeline]) -> None:
    model, pipeline = sdxl
    first = pipeline.text_encoders[0]
    reference = layers(first.module, padded(theirs(model.config / "tokenizer"), "a fox"))
    width = first.module.config.hidden_size

    assert torch.equal(encode(pipeline, "a fox", clip_skip=2).positive[..., :width], reference[-3])


@pytest.mark.parametrize("clip_skip", [0, 13])
def test_clip_skip_beyond_the_layers_is_refused(tiny: Pipeline, clip_skip: int) -> None:
    with pytest.raises(UsageError, match=f"no clip skip {clip_skip}"):
        encode(tiny, "a star", clip_skip=clip_skip)


def test_long_prompts_are_read_in_chunks(tiny: Pipeline) -> None:
    words = "a red circle on a black background " * 20  # 140 words
    long = encode(tiny, words, "blue")
    tokens = " ".join(words.split()[:75]), " ".join(words.split()[75:])
    parts = [encode(tiny, part).positive for part in tokens]

    assert (long.tokens, long.chunks) == (140, 2)
    assert long.positive.shape == long.negative.shape == (1, 154, 64)
    assert torch.allclose(long.positive, torch.cat(parts, dim=1), atol=1e-6)
    assert torch.allclose(long.negative[:, :77], encode(tiny, "blue").positive, atol=1e-6)
    assert torch.allclose(long.negative[:, 77:], encode(tiny, "").positive, atol=1e-6)


def test_75_tokens_are_one_chunk_76_are_two(tiny: Pipeline) -> None:
    assert encode(tiny, "red " * 75).chunks == 1
    assert encode(tiny, "red " * 76).chunks == 2


def test_a_weight_scales_its_tokens_and_keeps_the_mean(tiny: Pipeline) -> None:
    plain = encode(tiny, "a red circle").positive
    strong = encode(tiny, "a (red:1.5) circle").positive
    factors = torch.ones(77)
    factors[2] = 1.5  # start, a, red
    raw = plain * factors[:, None]

    assert torch.allclose(strong, raw * (plain.mean() / raw.mean()), rtol=1e-5)
    assert float(strong.mean()) == pytest.approx(float(plain.mean()), rel=1e-4)
    assert torch.equal(encode(tiny, "a (red:1.0) circle").positive, plain)
