"""The sizes of the tiny family's networks and its word-level tokenizer.

Every network has the topology of Stable Diffusion 1, so that its tensors bear the same 1131 names:
channels change between the same levels (first to second, second to third) and attention sits in
the same blocks. Only the widths are small. Knows nothing of training.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from shapes import BACKGROUNDS, COLOURS, SHAPES
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CAPTION_WORDS = ("a", "an", "on", "background", *SHAPES, *COLOURS, *BACKGROUNDS)
# Words a prompt may hold besides; they have tokens, but no caption taught them a meaning.
OTHER_WORDS = (
    *("and", "the", "of", "in", "with", "picture", "photo", "drawing", "style", "shape"),
    *("big", "small", "two", "cyan", "dark", "light", "no", "blurry", "bad", "quality"),
    *("flat", "outlined", "pastel", "striped", "glow", "glowing"),
)
START, END = "<|startoftext|>", "<|endoftext|>"
GROUPS = 8  # 32 groups, as in SD1, would leave one channel each: the colours are lost
TEXT_WIDTH = 64
TEXT_LENGTH = 77


class PlainAttention:
    """Attention as plain matrix products; a CPU's fused kernel is 3 times slower at this size."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Softmax(q k^T / sqrt(d)) v over (n, places, c); the UNet passes no mask."""
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k, v = attn.head_to_batch_dim(attn.to_k(seen)), attn.head_to_batch_dim(attn.to_v(seen))
        scores = torch.bmm(q * attn.scale, k.transpose(1, 2))
        with torch.autocast(scores.device.type, enabled=False):  # else softmax runs in F32
            shares = scores.softmax(dim=-1)
        output: Tensor = attn.to_out[0](attn.batch_to_head_dim(torch.bmm(shares, v)))
        return output


def make_vae() -> AutoencoderKL:
    """An autoencoder from (3, 64, 64) in -1..1 to (4, 8, 8), fresh weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 32, 40, 40),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=GROUPS,
        sample_size=64,
    )


def make_unet(in_channels: int = 4) -> UNet2DConditionModel:
    """A UNet over (in_channels, 8, 8), fresh weights; 8 attention heads everywhere, as in SD1.

    Half of its weights are at the 8x8 level, where shapes are decided.
    """
    unet = UNet2DConditionModel(
        in_channels=in_channels,
        sample_size=8,
        block_out_channels=(64, 32, 24, 24),
        layers_per_block=2,
        norm_num_groups=GROUPS,
        attention_head_dim=8,  # a count of heads, despite the name (diffusers, SD1 configs)
        cross_attention_dim=TEXT_WIDTH,
    )
    unet.set_attn_processor(PlainAttention())
    return unet


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A causal text encoder, hidden states (77, 64), fresh weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=12,  # as in SD1: the file has the same names
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # for the reason given in make_unet
    )
    return CLIPTextModel(config)


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1's noise schedule: its model card's scheduler_config.json."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt for CLIPTokenizer, and return it loaded from `folder`.

    Byte-level BPE as CLIP does it: 256 byte tokens, the same with '</w>' for a word's last letter,
    one token per merge, the two special tokens. The merges build each word from its left, so every
    known word is one token; any other text falls apart into bytes, and none is unknown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = _byte_letters()
    merges: list[tuple[str, str]] = []
    for word in (*CAPTION_WORDS, *OTHER_WORDS):
        pieces = [*word[:-1], word[-1] + "</w>"]
        left = pieces[0]
        for right in pieces[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    merged = [left + right for left, right in merges]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *merged, START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        **specials,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": TEXT_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    for name, content in (("tokenizer_config", config), ("special_tokens_map", specials)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in `folder`, written there first if it is missing."""
    if not (folder / "vocab.json").exists():
        return write_tokenizer(folder)
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token numbers of `captions`, int64 (n, 77), padded with the end token."""
    found = tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    )
    tokens: torch.Tensor = found.input_ids
    return tokens


def _byte_letters() -> list[str]:
    """The 256 letters that stand for bytes: GPT-2's bytes_to_unicode (encoder.py)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]
