"""A tiny CLIP model of random weights, as transformers writes it: what scores are tested with."""

from __future__ import annotations

import json
from pathlib import Path

from ckptools.render.prompts import clip_words

SIDE = 32


def save_clip(folder: Path, *, seed: int = 0) -> Path:
    """`CLIPModel`, tokenizer and preprocessor in a folder, all by transformers."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
             "num_hidden_layers": 2}  # fmt: skip
    config = CLIPConfig(
        text_config=sizes,
        vision_config={**sizes, "image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    with torch.no_grad():  # as they come, all pictures look alike to it
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    vocabulary, merges = clip_words()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    image_processor().save_pretrained(folder)
    return folder


def image_processor():
    """CLIP's own preprocessing in transformers, without torchvision: 4.57's name, then 5's."""
    import transformers

    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if int(transformers.__version__.split(".")[0]) < 5:
        return transformers.CLIPImageProcessor(**sizes)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(**sizes)
