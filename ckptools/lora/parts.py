"""Names of tensors in adapter files: which module, and which part of it. Knows no checkpoint.

Sources: kohya sd-scripts `networks/lora.py`, `networks/oft.py`; LyCORIS 4.1 `weight_list` of each
module; PEFT 0.21 `utils/save_and_load.py`; diffusers 0.42 `utils/state_dict_utils.py`
(UNET_TO_DIFFUSERS, DIFFUSERS_OLD_TO_PEFT, CONTROL_LORA_TO_DIFFUSERS).
"""

from __future__ import annotations

import re

EMBEDDING = "embedding"
"""The part of a bundled textual-inversion embedding: left aside, it changes no weight."""

# Suffix -> canonical part, for names that end in exactly this after a dot.
_SUFFIXES = {
    # kohya, LyCORIS
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora_up": "up",
    "lora_down": "down",
    "lora_mid": "mid",
    "alpha": "alpha",
    "scale": "scale",
    "dora_scale": "dora_scale",
    "bias_indices": "sparse_indices",
    "bias_values": "sparse_values",
    "bias_size": "sparse_size",
    # LyCORIS: GLoRA, IA3, full, norms, OFT
    "a1.weight": "a1",
    "a2.weight": "a2",
    "b1.weight": "b1",
    "b2.weight": "b2",
    "bm.weight": "bm",
    "on_input": "on_input",
    "diff": "diff",
    "diff_b": "diff_b",
    "set_weight": "set_weight",
    "reshape_weight": "reshape_weight",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
    "oft_blocks": "oft_blocks",
    "oft_diag": "oft_diag",
    "rescale": "rescale",
    "constraint": "alpha",
    # diffusers
    "lora_linear_layer.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up": "up",
    "lora_linear_layer.down": "down",
    "lora.up.weight": "up",
    "lora.down.weight": "down",
    "lora.up": "up",
    "lora.down": "down",
    # Control-LoRA
    "up": "up",
    "down": "down",
    # IA3 of LyCORIS is stored as `weight` and `on_input`; alone, `weight` is no adapter
    "weight": "ia3_weight",
}

# PEFT puts the adapter's name after these: lora_A.default.weight, hada_w1_a.default.
_PEFT = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "ia3_l": "ia3_l",
    "oft_R": "oft_R",
    "boft_R": "boft_R",
    "boft_s": "boft_s",
    **{f"hada_w{i}_{side}": f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"},
    **{f"hada_t{i}": f"hada_t{i}" for i in (1, 2)},
    **{f"lokr_w{i}": f"lokr_w{i}" for i in (1, 2)},
    **{f"lokr_w{i}_{side}": f"lokr_w{i}_{side}" for i in (1, 2) for side in "ab"},
    "lokr_t2": "lokr_t2",
}

_PEFT_NAME = re.compile(
    rf"(?P<module>.+)\.(?P<part>{'|'.join(sorted(_PEFT, key=len, reverse=True))})"
    r"(?:\.(?P<adapter>[^.]+?))??(?P<end>\.weight|\.bias)?"
)
_ORDINAL = re.compile(r"(?P<module>[a-z_0-9]+:\d+):(?P<part>up|down)")
_PROCESSOR = re.compile(
    r"(?P<module>.+?)(?:\.processor)?\.(?P<layer>to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)"
    r"_lora\.(?P<part>up|down|alpha)(?:\.weight)?"
)
_EMBEDDING = re.compile(r"bundle_emb\.(?P<name>[^.]+)\..+|<[^<>]+>")

# Old diffusers names of a CLIP text encoder's layers, which are called to_q and so on there.
_TEXT_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def split_key(key: str) -> tuple[str, str] | None:
    """(module name, canonical part) of a tensor in an adapter file; None for any other name.

    The module's name keeps the file's scheme, except that what old diffusers names moved into
    the suffix (`processor.to_out_lora.up`) is put back into it (`to_out.0`).

    >>> split_key("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight")
    ('lora_unet_mid_block_attentions_0_proj_in', 'down')
    >>> split_key("unet.mid_block.attentions.0.proj_in.lora_B.default.weight")
    ('unet.mid_block.attentions.0.proj_in', 'up')
    >>> split_key("unet.x.attn1.processor.to_out_lora.up.weight")
    ('unet.x.attn1.to_out.0', 'up')
    >>> split_key("unet:79:down")
    ('unet:79', 'down')
    """
    if match := _EMBEDDING.fullmatch(key):
        name = match["name"]
        return (f"bundle_emb.{name}" if name else key), EMBEDDING
    if match := _ORDINAL.fullmatch(key):
        return match["module"], match["part"]
    if match := _PROCESSOR.fullmatch(key):
        return _layer_name(match["module"], match["layer"]), match["part"]
    if match := _PEFT_NAME.fullmatch(key):
        part = _PEFT[match["part"]]
        if match["end"] == ".bias":
            return (_plain(match["module"]), "bias") if part == "up" else None
        return _plain(match["module"]), part
    return _by_suffix(key)


def _by_suffix(key: str) -> tuple[str, str] | None:
    """The longest known suffix after a dot, of at most three dotted words."""
    words = key.split(".")
    for count in (3, 2, 1):
        part = _SUFFIXES.get(".".join(words[-count:]))
        if part is not None and all(words[:-count]) and len(words) > count:
            return _plain(".".join(words[:-count])), part
    return None


def _layer_name(module: str, layer: str) -> str:
    if module.endswith("self_attn"):
        return f"{module}.{_TEXT_LAYERS.get(layer, layer)}"
    return f"{module}.to_out.0" if layer == "to_out" else f"{module}.{layer}"


def _plain(module: str) -> str:
    """The name without `processor`, and with the index that old diffusers left out of to_out."""
    module = module.replace(".processor.", ".")
    return f"{module}.0" if module.endswith(".to_out") else module
