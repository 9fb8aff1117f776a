"""Adapter kinds against LyCORIS and PEFT, in fp32; names and grouping of their files.

Oracles: the modules of lycoris-lora (merged weight, functional maths, output with the adapter
attached) and PEFT (merge_and_unload, output with the adapter attached). Every test goes through
the names those libraries give to their tensors.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as everybody writes it

from ckptools.errors import InputError, ManyErrors
from ckptools.lora import (
    EMBEDDING,
    bake_bias,
    bake_weight,
    group,
    load_kinds,
    scale_of,
    split_key,
)
from ckptools.lora.dora import axis_of, decompose
from ckptools.lora.kinds import register
from ckptools.tensors import TensorSpec

TOLERANCE = 1e-6  # of the largest magnitude: a few roundings of fp32
OUTPUT_TOLERANCE = 2e-6  # of outputs: the attached adapter rounds twice as often as a baked one
LAYERS = ["linear", "conv1", "conv3"]
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}


@pytest.fixture(scope="module")
def lycoris():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LYCORIS_KERNEL_BACKEND", "torch")
            reason = "lycoris-lora is not installed"
            yield pytest.importorskip("lycoris.modules", reason=reason, exc_type=ImportError)


@pytest.fixture(scope="module")
def peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("peft", reason="peft is not installed", exc_type=ImportError)


def make_layer(what, seed=0, rows=24, columns=16):
    torch.manual_seed(seed)
    if what == "linear":
        layer = nn.Linear(columns, rows)
    else:
        size = int(what[-1])
        layer = nn.Conv2d(columns, rows, size, padding=size // 2, stride=1)
    return layer.requires_grad_(requires_grad=False)


def make_input(layer):
    torch.manual_seed(99)
    return torch.randn(5, 16) if isinstance(layer, nn.Linear) else torch.randn(2, 16, 6, 6)


def run(layer, weight, bias, x):
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding)


def error(ours, theirs):
    """Largest difference, relative to the largest magnitude."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def specs_of(tensors):
    return {
        name: TensorSpec(name, DTYPES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def read(tensors, metadata=None, config=None):
    """The one module of these tensors, its parts and its scale."""
    (module,) = group(specs_of(tensors), metadata or {}, config=config).modules.values()
    parts = {part: tensors[name] for part, name in module.arrays.items()}
    numbers = {part: float(tensors[module.parts[part]].reshape(())) for part in module.numbers}
    return module, parts, scale_of(module, numbers)


def bake(tensors, layer, strength=1.0, dora="trained", **given_config):
    """(weight, bias) of a layer with the adapter baked in, and the module."""
    module, parts, scale = read(tensors, **given_config)
    weight, bias = layer.weight.data, layer.bias.data
    assert module.misfit(weight.shape) == ""
    before = [t.clone() for t in (weight, bias, *parts.values())]
    baked = bake_weight(module, weight, parts, scale=scale, strength=strength, dora=dora)
    if module.touches_bias != "no":
        bias = bake_bias(module, bias, parts, scale=scale, strength=strength)
    for old, new in zip(before, (weight, layer.bias.data, *parts.values()), strict=True):
        assert torch.equal(old, new)  # nothing given is written to
    if module.additive and module.touches_weight:
        check_rows(module, weight, parts, scale)
    return baked, bias, module


def check_rows(module, weight, parts, scale):
    """Any cut into row ranges gives the rows of the whole."""
    kind = load_kinds()[module.kind]
    whole = kind.delta(parts, tuple(weight.shape), scale).reshape(weight.shape[0], -1)
    cuts = [0, 1, 7, 8, weight.shape[0]]
    pieces = [kind.rows(parts, begin, end, scale) for begin, end in pairwise(cuts)]
    assert error(torch.cat(pieces), whole) <= TOLERANCE


def randomise(module, size=0.3, seed=1):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + torch.randn_like(parameter) * size
            parameter.requires_grad = False


# LyCORIS


def lycoris_module(lycoris, name, layer, *, size=0.3, alpha=2.0, dim=4, **options):
    module = getattr(lycoris, name)("lora_unet_x", layer, 1.0, lora_dim=dim, alpha=alpha, **options)
    randomise(module, size)
    return module.eval()


def saved(module, name="lora_unet_x"):
    state = module.custom_state_dict()
    if state is None:
        state = dict(module.state_dict())
    return {
        f"{name}.{part}": torch.as_tensor(t).detach().clone()
        for part, t in state.items()
        if part != "scalar"
    }


def attached(module, layer, x, strength=1.0):
    """The layer's output with LyCORIS' adapter on it."""
    module.multiplier = strength
    return module.forward(x)


LYCORIS = [
    ("LoConModule", {}, "lora"),
    ("LoConModule", {"use_tucker": True}, "lora"),
    ("LoConModule", {"rs_lora": True}, "lora"),
    ("LohaModule", {}, "loha"),
    ("LohaModule", {"use_tucker": True}, "loha"),
    ("LokrModule", {"factor": 4, "dim": 2}, "lokr"),
    ("LokrModule", {"factor": 8, "dim": 1, "decompose_both": True}, "lokr"),
    ("LokrModule", {"factor": 2, "dim": 2, "use_tucker": True}, "lokr"),
    ("LokrModule", {"factor": 4, "full_matrix": True}, "lokr"),
    ("GLoRAModule", {}, "glora"),
    ("IA3Module", {"train_on_input": True}, "ia3"),
    ("IA3Module", {"train_on_input": False}, "ia3"),
    ("DiagOFTModule", {"size": 0.05}, "oft"),
    ("DiagOFTModule", {"size": 0.05, "rescaled": True}, "oft"),
    ("DiagOFTModule", {"size": 0.05, "constraint": 1e-2}, "oft"),
    ("ButterflyOFTModule", {"dim": 8, "size": 0.05}, "boft"),
    ("ButterflyOFTModule", {"dim": 8, "size": 0.05, "rescaled": True, "constraint": 1e-2}, "boft"),
]
LYCORIS_IDS = [f"{name}-{'-'.join(options) or 'plain'}" for name, options, _ in LYCORIS]


@pytest.mark.parametrize("what", LAYERS)
@pytest.mark.parametrize(("name", "options", "kind"), LYCORIS, ids=LYCORIS_IDS)
def test_baked_layer_is_the_layer_with_lycoris_attached(lycoris, name, options, kind, what):
    layer = make_layer(what)
    adapter = lycoris_module(lycoris, name, layer, **options)
    x = make_input(layer)
    theirs = attached(adapter, layer, x)

    weight, bias, module = bake(saved(adapter), layer)

    assert module.kind == kind
    assert error(weight, layer.weight) > 0.01  # the adapter does something
    assert error(run(layer, weight, bias, x), theirs) <= OUTPUT_TOLERANCE
    if name not in ("LohaModule", "LokrModule"):  # 4.1 merges these with the scale squared
        merged, _ = adapter.get_merged_weight(1.0, layer.weight.shape)
        assert error(weight, merged) <= TOLERANCE


@pytest.mark.parametrize("what", LAYERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name, options, _ in LYCORIS
        if not options.get("rescaled")  # where LyCORIS' multiplier 0 would not be W
    ],
)
@pytest.mark.parametrize("strength", [0.6, -0.5])
def test_strength_is_the_multiplier_of_lycoris(lycoris, name, options, what, strength):
    layer = make_layer(what)
    adapter = lycoris_module(lycoris, name, layer, **options)
    x = make_input(layer)
    theirs = attached(adapter, layer, x, strength)

    weight, bias, _ = bake(saved(adapter), layer, strength)

    assert error(run(layer, weight, bias, x), theirs) <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("what", LAYERS)
@pytest.mark.parametrize(("name", "options", "kind"), LYCORIS, ids=LYCORIS_IDS)
def test_strength_zero_is_the_weight_to_the_bit(lycoris, name, options, kind, what):
    layer = make_layer(what)
    adapter = lycoris_module(lycoris, name, layer, **options)

    weight, bias, module = bake(saved(adapter), layer, 0.0)

    assert module.kind == kind
    assert torch.equal(weight, layer.weight)
    assert torch.equal(bias, layer.bias)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("name", ["locon", "loha", "lokr"])
def test_delta_is_that_of_lycoris_functional(lycoris, name, tucker):
    import importlib

    functional = importlib.import_module(f"lycoris.functional.{name}")
    torch.manual_seed(4)
    shape = (24, 16) if (name, tucker) == ("loha", False) else (24, 16, 3, 3)
    weights = functional.weight_gen(torch.zeros(shape), 2, tucker=tucker)
    weights = [w if w is None else torch.randn_like(w) for w in weights]
    if name == "locon" and not tucker:
        weights[0] = torch.randn(2, 16, 3, 3)
    gamma = 1.7
    theirs = functional.diff_weight(*weights, gamma=gamma * (2 if name == "lokr" else 1))
    order = {
        "locon": ["lora_down.weight", "lora_up.weight", "lora_mid.weight"],
        "loha": [f"hada_{part}" for part in ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")],
        "lokr": [f"lokr_{p}" for p in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")],
    }[name]
    if name == "lokr" and tucker:  # its rank_scale takes w2_a's second axis, 24 / 4, for the rank
        theirs = theirs * weights[4].shape[1] / 2
    tensors = {f"x.{p}": w for p, w in zip(order, weights, strict=False) if w is not None}

    module, parts, _ = read(tensors)
    ours = load_kinds()[module.kind].delta(parts, shape, gamma)

    assert error(ours, theirs.reshape(shape)) <= TOLERANCE


@pytest.mark.parametrize("name", ["LohaModule", "LokrModule"])
def test_lycoris_merge_of_alpha_equal_to_rank(lycoris, name):
    layer = make_layer("conv3")
    adapter = lycoris_module(lycoris, name, layer, alpha=4.0, dim=4, factor=4)

    weight, _, _ = bake(saved(adapter), layer)

    merged, _ = adapter.get_merged_weight(1.0, layer.weight.shape)
    assert error(weight, merged) <= TOLERANCE


@pytest.mark.parametrize("what", LAYERS)
@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize("name", ["LoConModule", "LohaModule", "LokrModule"])
@pytest.mark.parametrize("rows", [24, 16])  # 16: square, so that only the shape tells the axis
def test_dora_of_lycoris(lycoris, name, on_out, what, rows):
    layer = make_layer(what, rows=rows)
    adapter = lycoris_module(lycoris, name, layer, weight_decompose=True, wd_on_out=on_out)
    x = make_input(layer)
    theirs = attached(adapter, layer, x)
    tensors = saved(adapter)

    weight, bias, module = bake(tensors, layer)

    assert module.dora == "dora_scale"
    assert not module.additive
    assert error(run(layer, weight, bias, x), theirs) <= OUTPUT_TOLERANCE
    if name == "LoConModule":
        merged, _ = adapter.get_merged_weight(1.0, layer.weight.shape)
        assert error(weight, merged) <= TOLERANCE
    assert torch.equal(bake(tensors, layer, 0.0)[0], layer.weight)
    half, _, _ = bake(tensors, layer, 0.5)
    assert error(half, (weight + layer.weight) / 2) <= TOLERANCE


def test_full_difference_of_lycoris(lycoris):
    layer = make_layer("conv3")
    adapter = lycoris.FullModule("lora_unet_x", layer)
    torch.manual_seed(2)
    tensors = {
        "lora_unet_x.diff": torch.randn_like(layer.weight),
        "lora_unet_x.diff_b": torch.randn_like(layer.bias),
    }
    adapter.weight.data = tensors["lora_unet_x.diff"].clone()
    adapter.bias.data = tensors["lora_unet_x.diff_b"].clone()
    x = make_input(layer)
    adapter.multiplier = 0.6
    theirs = adapter.forward(x)

    weight, bias, module = bake(tensors, layer, 0.6)

    assert module.touches_bias == "needed"
    assert error(run(layer, weight, bias, x), theirs) <= OUTPUT_TOLERANCE
    assert error(weight, adapter.get_merged_weight(0.6, layer.weight.shape)[0]) <= TOLERANCE


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.GroupNorm(4, 16)])
def test_norm_of_lycoris(lycoris, norm):
    norm.requires_grad_(requires_grad=False)
    adapter = lycoris.NormModule("lora_unet_x", norm, 1.0)
    randomise(adapter)
    x = torch.randn(3, 16)
    adapter.multiplier = 0.6
    theirs = adapter.forward(x)

    weight, bias, module = bake(saved(adapter), norm, 0.6)

    assert module.kind == "norm"
    norm.weight.data, norm.bias.data = weight, bias
    norm.forward = type(norm).forward.__get__(norm)
    assert error(norm(x), theirs) <= TOLERANCE


# PEFT


class Net(nn.Module):
    def __init__(self, rows=24):
        super().__init__()
        self.conv3 = make_layer("conv3", 1, rows)
        self.conv1 = make_layer("conv1", 2, columns=rows)
        self.linear = make_layer("linear", 3, columns=24)
        self.last = make_layer("linear", 4, rows=8, columns=24)

    def forward(self, x):
        h = torch.tanh(self.conv1(torch.tanh(self.conv3(x)))).mean((2, 3))
        return self.last(torch.tanh(self.linear(h)))


TARGETS = ["conv3", "conv1", "linear", "last"]
PATTERNS = {"rank_pattern": {"conv1": 2}, "alpha_pattern": {"linear": 5, "^last": 3}}

PEFT = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True, **PATTERNS}),
    "lora-bias": ("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True}),
    "lora-alpha-0": ("LoraConfig", {"r": 4, "lora_alpha": 0}),  # PEFT's 0 is 0
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True, **PATTERNS}),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 6, **PATTERNS}),
    "loha-tucker": ("LoHaConfig", {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 6, "decompose_factor": 4}),
    "lokr-both": ("LoKrConfig", {"r": 1, "alpha": 6, "decompose_both": True}),
    "lokr-whole": ("LoKrConfig", {"r": 16, "alpha": 6}),
    "lokr-tucker": (
        "LoKrConfig",
        {"r": 2, "alpha": 6, "decompose_factor": 2, "use_effective_conv2d": True},
    ),
    "ia3": ("IA3Config", {"feedforward_modules": ["conv1", "last"]}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}),
    "oft-neumann": ("OFTConfig", {"oft_block_size": 8}),
    "oft-neumann-3": ("OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "oft-coft": ("OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.5}),
    "oft-shared": ("OFTConfig", {"oft_block_size": 4, "block_share": True}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
}


def peft_model(peft, name, net):
    """(model with the adapter on it, its tensors by their names in a file, adapter_config.json)."""
    kind, options = PEFT[name]
    config = getattr(peft, kind)(target_modules=TARGETS, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config).eval()
        randomise(model, 0.05 if "oft" in name else 0.3)
        if name == "lokr-whole":
            randomise(model, 0.1, 5)
        tensors = peft.get_peft_model_state_dict(model)
    told = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return model, tensors, json.loads(json.dumps(told, default=str))


@pytest.mark.parametrize("rows", [24, 16])  # 16: conv3 is square
@pytest.mark.parametrize("name", PEFT)
def test_baked_network_is_that_of_merge_and_unload(peft, name, rows):
    net, original = Net(rows), Net(rows)
    model, tensors, config = peft_model(peft, name, net)
    x = torch.randn(2, 16, 6, 6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(x)
        merged = model.merge_and_unload()
    modules = group(specs_of(tensors), {}, config=config).modules
    assert {m.removeprefix("base_model.model.") for m in modules} == set(TARGETS)
    worst = 0.0
    for path, module in modules.items():
        target = path.removeprefix("base_model.model.")
        own = {key: t for key, t in tensors.items() if key in module.parts.values()}
        layer, theirs = getattr(original, target), getattr(merged, target)
        weight, bias, _ = bake(own, layer, config=config)
        if name != "lora-alpha-0":
            assert error(weight, layer.weight) > 0.01
        worst = max(worst, error(weight, theirs.weight), error(bias, theirs.bias))
        layer.weight.data, layer.bias.data = weight, bias
    assert worst <= TOLERANCE
    if "oft" not in name or "boft" in name:  # PEFT's OFT folds convolutions' inputs its own way
        assert error(original(x), output) <= OUTPUT_TOLERANCE


def test_peft_config_in_the_metadata_of_diffusers(peft):
    """diffusers puts all components' configs into one JSON, with prefixes."""
    net, original = Net(), Net()
    model, tensors, config = peft_model(peft, "rslora", net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    packed = {f"unet.{key}": value for key, value in config.items()} | {"text_encoder.r": 99}
    metadata = {"lora_adapter_metadata": json.dumps(packed)}
    for target in TARGETS:
        own = {
            name.replace("base_model.model.", "unet."): tensor
            for name, tensor in tensors.items()
            if f".{target}." in name
        }
        weight, _, module = bake(own, getattr(original, target), metadata=metadata)
        assert module.rank_stabilised
        assert error(weight, getattr(merged, target).weight) <= TOLERANCE


def test_embedding_of_peft(peft):
    torch.manual_seed(3)

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.token_embedding = nn.Embedding(50, 16)

        def forward(self, ids):
            return self.token_embedding(ids)

    for use_dora in (False, True):
        net = Words()
        weight = net.token_embedding.weight.data.clone()
        config = peft.LoraConfig(
            target_modules=["token_embedding"], r=4, lora_alpha=6, use_dora=use_dora
        )
        model = peft.get_peft_model(net, config).eval()
        randomise(model)
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        merged = model.merge_and_unload().token_embedding.weight

        tensors = {name: tensor.detach().clone() for name, tensor in state.items()}
        module, parts, scale = read(tensors, config={"r": 4, "lora_alpha": 6})
        ours = bake_weight(module, weight, parts, scale=scale)

        assert (module.rank, module.measure.rows) == (4, 50)
        assert error(ours, merged) <= TOLERANCE


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_butterflies_of_peft_with_its_own_permutations(peft, stages):
    """PEFT multiplies out more than one stage on CUDA only; its permutations are in the open."""
    layer = make_layer("linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = peft.get_peft_model(
            nn.Sequential(make_layer("linear")),
            peft.BOFTConfig(target_modules=["0"], boft_block_size=4),
        )
    boft = net.base_model.model[0]
    torch.manual_seed(6)
    rotations = torch.randn(stages, 4, 4, 4) * 0.1
    scales = 1 + torch.randn(24, 1) * 0.1
    matrix = torch.eye(16)
    for i in range(stages):
        blocks = torch.block_diag(*boft.cayley_batch(rotations[i]))
        order = boft.block_butterfly_perm(16, 4 // 2**i, 2, stages - 1)
        shuffle = boft.perm2mat(order)
        matrix = shuffle @ blocks @ shuffle.T @ matrix
    theirs = (matrix @ layer.weight.T).T * scales

    weight, _, _ = bake({"x.boft_R": rotations, "x.boft_s": scales}, layer)

    assert error(weight, theirs) <= TOLERANCE


# Kinds without a library that still computes them, against their formula written out


def test_old_layout_of_glora_is_told_by_shapes():
    torch.manual_seed(1)
    layer = make_layer("linear", rows=16)
    a1, a2, b1, b2 = (torch.randn(s) * 0.1 for s in ((4, 16), (16, 4), (4, 16), (16, 4)))
    old = {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
    new = {"a1": a2, "a2": a1, "b1": b2, "b2": b1}
    expected = layer.weight + (layer.weight @ a2 @ a1 + b2 @ b1) * 0.5
    for parts in (old, new):
        tensors = {f"x.{part}.weight": tensor for part, tensor in parts.items()}
        tensors["x.alpha"] = torch.tensor(2.0)

        weight, _, module = bake(tensors, layer)

        assert module.rank == 4
        assert error(weight, expected) <= TOLERANCE


def test_tucker_glora():
    torch.manual_seed(1)
    layer = make_layer("conv3")
    a1, a2, b1 = torch.randn(16, 4, 1, 1), torch.randn(4, 16, 1, 1), torch.randn(24, 4, 1, 1)
    b2, bm = torch.randn(4, 16, 1, 1), torch.randn(4, 4, 3, 3)
    x = make_input(layer)
    low = F.conv2d(F.conv2d(F.conv2d(x, b2), bm, padding=1), b1)
    expected = layer(x + F.conv2d(F.conv2d(x, a2), a1)) + low
    named = zip(["a1", "a2", "b1", "b2", "bm"], (a1, a2, b1, b2, bm), strict=True)

    weight, bias, _ = bake({f"x.{part}.weight": tensor for part, tensor in named}, layer)

    assert error(run(layer, weight, bias, x), expected) <= TOLERANCE


def test_constrained_oft_of_kohya():
    """networks/oft.py: Q is clamped to alpha * out; blocks of rows are turned by R transposed."""
    torch.manual_seed(1)
    layer = make_layer("linear")
    blocks, alpha = torch.randn(6, 4, 4) * 0.1, 1e-2
    q = blocks - blocks.transpose(1, 2)
    norm = torch.norm(q.flatten())
    q = q * ((torch.clamp(norm, max=alpha * 24) + 1e-8) / (norm + 1e-8))
    r = torch.matmul(torch.eye(4) + q, (torch.eye(4) - q).inverse())
    r = 0.7 * (r - torch.eye(4)) + torch.eye(4)
    expected = torch.einsum("k n m, k n p -> k m p", r, layer.weight.reshape(6, 4, -1))
    name = "oft_unet_x"
    tensors = {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(alpha)}

    weight, _, _ = bake(tensors, layer, 0.7)

    assert norm > alpha * 24
    assert error(weight, expected.reshape(24, 16)) <= TOLERANCE


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_oft_diag_is_the_rotation_itself(strength):
    torch.manual_seed(1)
    layer = make_layer("conv3")
    r, rescale = torch.randn(6, 4, 4), torch.rand(6, 4, 1)
    s = strength
    turned = torch.block_diag(*(s * m.T + (1 - s) * torch.eye(4) for m in r))
    factors = 1 + s * (rescale.reshape(-1, 1) - 1)
    expected = (factors * (turned @ layer.weight.flatten(1))).reshape(layer.weight.shape)

    weight, _, _ = bake({"x.oft_diag": r, "x.rescale": rescale}, layer, s)

    assert error(weight, expected) <= TOLERANCE


def test_set_weight_replaces_and_strength_interpolates():
    layer = make_layer("linear")
    new = torch.randn(24, 16)

    assert torch.equal(bake({"x.set_weight": new}, layer)[0], new)
    assert error(bake({"x.set_weight": new}, layer, 0.5)[0], (new + layer.weight) / 2) <= TOLERANCE


def test_sparse_residual_of_extract_locon():
    torch.manual_seed(1)
    layer = make_layer("conv3")
    up, down = torch.randn(24, 2, 1, 1), torch.randn(2, 16, 3, 3)
    residual = torch.randn(24, 144)
    residual[residual.abs() < 1.5] = 0.0
    sparse = residual.to_sparse().coalesce()
    tensors = {
        "x.lora_up.weight": up,
        "x.lora_down.weight": down,
        "x.bias_indices": sparse.indices(),
        "x.bias_values": sparse.values(),
        "x.bias_size": torch.tensor([24, 144]),
    }
    expected = layer.weight.flatten(1) + up.flatten(1) @ down.flatten(1) + residual

    weight, _, _ = bake(tensors, layer)

    assert error(weight.flatten(1), expected) <= TOLERANCE


@pytest.mark.parametrize("indices", [[[0, 24], [0, 1]], [[0, 1], [0, 144]], [[0, 1], [0, -2]]])
def test_a_sparse_residual_outside_of_the_weight_is_refused(indices):
    tensors = {
        "x.lora_up.weight": torch.ones(24, 2, 1, 1),
        "x.lora_down.weight": torch.ones(2, 16, 3, 3),
        "x.bias_indices": torch.tensor(indices),
        "x.bias_values": torch.ones(2),
    }

    with pytest.raises(InputError, match="outside of the weight, 24 x 144"):
        bake(tensors, make_layer("conv3"))


def test_ia3_of_the_other_side_is_refused():
    """Which side it is for is a value: 16 numbers fit the inputs, but are said to be for rows."""
    tensors = {"x.weight": torch.ones(16), "x.on_input": torch.tensor(0)}

    with pytest.raises(InputError, match=r"16 rows, the weight is \[24, 16\]"):
        bake(tensors, make_layer("linear"))


def test_diff_b_stands_beside_a_lora():
    layer = make_layer("linear")
    change = torch.randn(24)
    tensors = {
        "x.lora_up.weight": torch.randn(24, 2),
        "x.lora_down.weight": torch.randn(2, 16),
        "x.diff_b": change,
    }

    _, bias, module = bake(tensors, layer, 0.5)

    assert module.kind == "lora"
    assert torch.equal(bias, layer.bias + change * 0.5)


@pytest.mark.parametrize(
    ("up", "down", "shape"),
    [
        ((24, 4), (4, 16), (24, 16, 1, 1)),  # 2-D factors, 4-D weight
        ((24, 4, 1, 1), (4, 16, 1, 1), (24, 16)),  # 4-D factors, 2-D weight (SDXL proj_in)
        ((24, 4, 1, 1), (4, 16, 1, 1), (24, 16, 1, 1)),
    ],
)
def test_factors_and_weight_may_differ_in_dimensions(up, down, shape):
    torch.manual_seed(1)
    tensors = {"x.lora_up.weight": torch.randn(up), "x.lora_down.weight": torch.randn(down)}
    module, parts, scale = read(tensors)
    weight = torch.randn(shape)

    baked = bake_weight(module, weight, parts, scale=scale)

    delta = tensors["x.lora_up.weight"].reshape(24, 4) @ tensors["x.lora_down.weight"].reshape(
        4, 16
    )
    assert error(baked, weight + delta.reshape(shape)) <= TOLERANCE


def test_fp64_in_fp64_out_and_half_becomes_fp32():
    tensors = {"x.lora_up.weight": torch.randn(8, 2), "x.lora_down.weight": torch.randn(2, 4)}
    module, parts, scale = read(tensors)
    for weight, wide in (
        (torch.randn(8, 4).half(), torch.float32),
        (torch.randn(8, 4), torch.float32),
        (torch.randn(8, 4).double(), torch.float64),
    ):
        assert bake_weight(module, weight, parts, scale=scale).dtype == wide
    doubled = {part: tensor.double() for part, tensor in parts.items()}
    assert load_kinds()["lora"].delta(doubled, (8, 4), 1.0).dtype == torch.float64


def test_comfy_reading_divides_rows_by_the_weight_without_the_change():
    torch.manual_seed(1)
    weight, delta, magnitude = torch.randn(6, 4), torch.randn(6, 4), torch.rand(6, 1)
    own = weight.norm(dim=1, keepdim=True)
    changed = (weight + delta) * magnitude / own

    rows = decompose(weight, delta, magnitude, part="dora_scale", strength=0.7, reading="comfy")
    assert error(rows, weight + 0.7 * (changed - weight)) <= TOLERANCE

    columns = torch.rand(1, 4)
    trained = decompose(weight, delta, columns, part="dora_scale")
    comfy = decompose(weight, delta, columns, part="dora_scale", reading="comfy")
    assert torch.equal(trained, comfy)


def test_dora_of_a_zero_row_stays_zero():
    for part in ("dora_scale", "magnitude"):
        weight = torch.randn(3, 4)
        weight[1] = 0.0
        baked = decompose(weight, torch.zeros(3, 4), torch.ones(3, 1), part=part)
        assert torch.equal(baked[1], torch.zeros(4))
        assert torch.isfinite(baked).all()


@pytest.mark.parametrize(
    ("part", "magnitude", "weight", "axis"),
    [
        ("magnitude", (8,), (8, 8), "rows"),
        ("magnitude", (1, 8, 1, 1), (8, 8, 3, 3), "rows"),
        ("magnitude", (4,), (50, 4), "columns"),  # an embedding
        ("dora_scale", (8, 1), (8, 8), "rows"),
        ("dora_scale", (1, 8), (8, 8), "columns"),
        ("dora_scale", (1, 8, 1, 1), (8, 8, 3, 3), "columns"),
        ("dora_scale", (1, 6, 1, 1), (6, 8, 3, 3), "rows"),  # PEFT's, renamed by diffusers
        ("dora_scale", (8,), (8, 4), "rows"),
    ],
)
def test_axis_of_a_magnitude(part, magnitude, weight, axis):
    assert axis_of(part, magnitude, weight) == axis


def test_axis_of_a_magnitude_that_fits_neither():
    with pytest.raises(InputError, match="dora_scale is"):
        axis_of("dora_scale", (5, 1), (8, 4))


# Scale


LORA = {"x.lora_up.weight": torch.ones(8, 4), "x.lora_down.weight": torch.ones(4, 6)}
LOKR = {"x.lokr_w1": torch.ones(2, 2), "x.lokr_w2": torch.ones(4, 3)}


@pytest.mark.parametrize(
    ("tensors", "config", "scale"),
    [
        (LORA, None, 1.0),
        (LORA | {"x.alpha": torch.tensor(2.0)}, None, 0.5),
        (LORA | {"x.alpha": torch.tensor([2.0])}, None, 0.5),
        (LORA | {"x.alpha": torch.tensor(0.0)}, None, 1.0),
        (LORA | {"x.alpha": torch.tensor(2.0), "x.scale": torch.tensor(3.0)}, None, 3.0),
        (LORA | {"x.alpha": torch.tensor(2.0)}, {"r": 4, "lora_alpha": 99}, 0.5),
        (LORA, {"r": 4, "lora_alpha": 2}, 0.5),
        (LORA, {"r": 4, "lora_alpha": 0}, 0.0),
        (LORA, {"r": 4, "lora_alpha": 2, "use_rslora": True}, 1.0),
        (LORA, {"r": 9, "lora_alpha": 2, "rank_pattern": {"x": 4}}, 0.5),
        (LORA, {"r": 4, "lora_alpha": 2, "alpha_pattern": {"y": 8}}, 0.5),
        (LORA, {"r": 4, "lora_alpha": 2, "alpha_pattern": {"^x$": 8}}, 2.0),
        (LOKR | {"x.alpha": torch.tensor(9.9e9)}, None, 1.0),
        (LOKR, {"r": 16, "alpha": 8}, 0.5),
        ({"x.diff": torch.ones(2, 2), "x.alpha": torch.tensor(9.0)}, None, 1.0),
        ({"x.oft_blocks": torch.ones(2, 2, 2), "x.alpha": torch.tensor(1e-3)}, None, 1.0),
    ],
)
def test_scale(tensors, config, scale):
    assert read(tensors, config=config)[2] == pytest.approx(scale, rel=1e-7)


@pytest.mark.parametrize("tensors", [LORA, {"x.oft_blocks": torch.ones(2, 2, 2)}])
def test_scale_that_is_no_number(tensors):
    module, _, _ = read(tensors | {"x.alpha": torch.tensor(1.0)})
    with pytest.raises(InputError, match="alpha is nan") as caught:
        scale_of(module, {"alpha": math.nan})
    assert caught.value.where == "x.alpha"


def test_a_missing_alpha_is_noted():
    assert "scale 1" in group(specs_of(LORA), {}).notes[0]
    assert group(specs_of(LORA | {"x.alpha": torch.tensor(1.0)}), {}).notes == ()
    assert group(specs_of(LORA), {}, config={"r": 4, "lora_alpha": 1}).notes == ()


# Names


UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn"
FULL = "diffusion_model.input_blocks.1.1.proj_in"
LDM = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
BARE = UNET.removeprefix("unet.")
TOKENS = "base_model.model.token_embedding"
OFT = "oft_unet_output_blocks_3_1_proj_in"

NAMES = [
    (f"{KOHYA}.lora_down.weight", KOHYA, "down"),
    (f"{KOHYA}.lora_up.weight", KOHYA, "up"),
    (f"{KOHYA}.lora_mid.weight", KOHYA, "mid"),
    (f"{KOHYA}.alpha", KOHYA, "alpha"),
    (f"{KOHYA}.dora_scale", KOHYA, "dora_scale"),
    (f"{KOHYA}.scale", KOHYA, "scale"),
    ("lora_te2_text_projection.lora_up.weight", "lora_te2_text_projection", "up"),
    (f"{KOHYA}.hada_w1_a", KOHYA, "hada_w1_a"),
    (f"{KOHYA}.hada_t2", KOHYA, "hada_t2"),
    (f"{KOHYA}.lokr_w1", KOHYA, "lokr_w1"),
    (f"{KOHYA}.lokr_w2_b", KOHYA, "lokr_w2_b"),
    (f"{KOHYA}.lokr_t2", KOHYA, "lokr_t2"),
    (f"{KOHYA}.weight", KOHYA, "ia3_weight"),
    (f"{KOHYA}.on_input", KOHYA, "on_input"),
    (f"{KOHYA}.a1.weight", KOHYA, "a1"),
    (f"{KOHYA}.bm.weight", KOHYA, "bm"),
    (f"{KOHYA}.diff", KOHYA, "diff"),
    (f"{KOHYA}.diff_b", KOHYA, "diff_b"),
    (f"{KOHYA}.w_norm", KOHYA, "w_norm"),
    (f"{KOHYA}.b_norm", KOHYA, "b_norm"),
    (f"{KOHYA}.oft_blocks", KOHYA, "oft_blocks"),
    (f"{KOHYA}.rescale", KOHYA, "rescale"),
    (f"{KOHYA}.constraint", KOHYA, "alpha"),
    (f"{KOHYA}.bias_indices", KOHYA, "sparse_indices"),
    (f"{OFT}.oft_blocks", OFT, "oft_blocks"),
    ("lycoris_down_blocks_0_x.oft_diag", "lycoris_down_blocks_0_x", "oft_diag"),
    ("diffusion_model.img_in.set_weight", "diffusion_model.img_in", "set_weight"),
    ("diffusion_model.img_in.reshape_weight", "diffusion_model.img_in", "reshape_weight"),
    (f"{FULL}.lora_up.weight", FULL, "up"),
    (f"{UNET}.to_q.lora_A.weight", f"{UNET}.to_q", "down"),
    (f"{UNET}.to_q.lora_B.weight", f"{UNET}.to_q", "up"),
    (f"{UNET}.to_q.lora_A.default.weight", f"{UNET}.to_q", "down"),
    (f"{UNET}.to_q.lora_B.my_style-1.weight", f"{UNET}.to_q", "up"),
    (f"{UNET}.to_q.lora_B.bias", f"{UNET}.to_q", "bias"),
    (f"{UNET}.to_q.lora_B.default.bias", f"{UNET}.to_q", "bias"),
    (f"{UNET}.to_q.lora_A", f"{UNET}.to_q", "down"),
    (f"{UNET}.to_out.0.lora_A.weight", f"{UNET}.to_out.0", "down"),
    (f"{UNET}.to_q.lora_magnitude_vector", f"{UNET}.to_q", "magnitude"),
    (f"{UNET}.to_q.lora_magnitude_vector.weight", f"{UNET}.to_q", "magnitude"),
    (f"{UNET}.to_q.lora_magnitude_vector.default.weight", f"{UNET}.to_q", "magnitude"),
    (f"{UNET}.to_out.lora_magnitude_vector", f"{UNET}.to_out.0", "magnitude"),
    (f"base_model.model.{TEXT}.q_proj.lora_A.weight", f"base_model.model.{TEXT}.q_proj", "down"),
    (f"{TOKENS}.lora_embedding_A", TOKENS, "embedding_a"),
    ("x.token_embedding.lora_embedding_B.default", "x.token_embedding", "embedding_b"),
    (f"{UNET}.to_q.hada_w1_a.default", f"{UNET}.to_q", "hada_w1_a"),
    (f"{UNET}.to_q.ia3_l", f"{UNET}.to_q", "ia3_l"),
    (f"{UNET}.to_q.oft_R.default.weight", f"{UNET}.to_q", "oft_R"),
    (f"{UNET}.to_q.boft_s", f"{UNET}.to_q", "boft_s"),
    (f"{UNET}.processor.to_q_lora.down.weight", f"{UNET}.to_q", "down"),
    (f"{UNET}.processor.to_out_lora.up.weight", f"{UNET}.to_out.0", "up"),
    (f"{BARE}.processor.to_v_lora.up.weight", f"{BARE}.to_v", "up"),
    (f"{UNET}.processor.to_q_lora.alpha", f"{UNET}.to_q", "alpha"),
    (f"{UNET}.processor.to_k.lora.down.weight", f"{UNET}.to_k", "down"),
    ("unet.x.proj_in.lora.down.weight", "unet.x.proj_in", "down"),
    (f"{TEXT}.q_proj.lora_linear_layer.up.weight", f"{TEXT}.q_proj", "up"),
    (f"{TEXT}.to_q_lora.up.weight", f"{TEXT}.q_proj", "up"),
    (f"{TEXT}.to_out_lora.down.weight", f"{TEXT}.out_proj", "down"),
    (f"{LDM}.down", LDM, "down"),
    ("input_blocks.1.0.in_layers.2.up", "input_blocks.1.0.in_layers.2", "up"),
    ("unet:79:down", "unet:79", "down"),
    ("text_encoder:0:up", "text_encoder:0", "up"),
    ("bundle_emb.style.string_to_param.*", "bundle_emb.style", EMBEDDING),
    ("bundle_emb.my style.clip_g", "bundle_emb.my style", EMBEDDING),
    ("<s1>", "<s1>", EMBEDDING),
]


@pytest.mark.parametrize(("key", "module", "part"), NAMES)
def test_split_key(key, module, part):
    assert split_key(key) == (module, part)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "alpha",
        ".alpha",
        "model.diffusion_model.out.2.bias",
        "emb_params",
        "unet.x.lora_A.bias",
        "unet:up",
        "x.lokr_t1",
        "x.lora_up.bias",
        "zero_convs.0.0.bias",
    ],
)
def test_names_that_are_no_part_of_an_adapter(key):
    assert split_key(key) is None


def test_every_part_a_kind_wants_has_a_name():
    """No layout asks for a part that no name gives, and no name gives a part nobody knows."""
    companions = {"alpha", "scale", "dora_scale", "magnitude", "diff_b", "reshape_weight"}
    kinds = load_kinds()
    assert {"lora", "loha", "lokr", "ia3", "glora", "full", "norm", "oft", "boft"} <= set(kinds)
    from ckptools.lora import parts

    given_parts = {*parts._SUFFIXES.values(), *parts._PEFT.values(), "bias"}
    wanted = {part for kind in kinds.values() for part in kind.marks}
    assert wanted | companions == given_parts


# Grouping


def whole_modules():
    """Tensors of a whole module of each kind: part suffix -> shape."""
    return [
        {"lora_up.weight": (8, 2), "lora_down.weight": (2, 6), "alpha": ()},
        {"lora_A.weight": (2, 6), "lora_B.weight": (8, 2), "lora_magnitude_vector": (8,)},
        {
            "lora_up.weight": (8, 2, 1, 1),
            "lora_mid.weight": (2, 2, 3, 3),
            "lora_down.weight": (2, 6, 1, 1),
        },
        {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 3), "dora_scale": (8, 1)},
        {"weight": (8,), "on_input": ()},
        {"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (8, 2), "b2.weight": (2, 6)},
        {"diff": (8, 6), "diff_b": (8,)},
        {"diff_b": (8,)},
        {"set_weight": (8, 6)},
        {"w_norm": (8,), "b_norm": (8,)},
        {"oft_blocks": (4, 2, 2), "alpha": ()},
        {"oft_blocks": (2, 2, 4, 4), "rescale": (8, 1)},
        {"boft_R": (1, 3, 2, 2), "boft_s": (8, 1)},
    ]


@given(
    chosen=st.lists(st.sampled_from(range(len(whole_modules()))), min_size=1, max_size=12),
    embeddings=st.integers(0, 3),
    strangers=st.integers(0, 3),
)
def test_grouping_is_total_and_disjoint(chosen, embeddings, strangers):
    """Every tensor is in exactly one module part, embedding or the unknown."""
    names = {
        f"lora_unet_{i}.{suffix}": shape
        for i, which in enumerate(chosen)
        for suffix, shape in whole_modules()[which].items()
    }
    names |= {f"bundle_emb.e{i}.clip_l": (3, 768) for i in range(embeddings)}
    names |= {f"stranger.{i}.running_mean": (4,) for i in range(strangers)}
    specs = {name: TensorSpec(name, "F16", shape) for name, shape in names.items()}

    file = group(specs, {}, allow_unknown=True)

    seen = [name for module in file.modules.values() for name in module.parts.values()]
    seen += [name for tensors in file.embeddings.values() for name in tensors]
    seen += file.unknown
    assert sorted(seen) == sorted(names)
    assert len(file.modules) == len(chosen)
    assert len(file.embeddings) == embeddings
    assert len(file.unknown) == strangers


def shapes(**parts):
    return {
        f"x.{name.replace('__', '.')}": TensorSpec(f"x.{name.replace('__', '.')}", "F32", shape)
        for name, shape in parts.items()
    }


UP, DOWN = "lora_up__weight", "lora_down__weight"
BAD = {
    "missing half": (shapes(**{UP: (8, 2)}), r"x: LoRA lacks 'down'; it has 'up'"),
    "missing both": (shapes(alpha=()), "nothing to scale"),
    "missing hada": (
        shapes(hada_w1_a=(8, 2), hada_w1_b=(2, 6), hada_w2_a=(8, 2)),
        "LoHa lacks 'hada_w2_b'",
    ),
    "half a Tucker": (
        shapes(
            hada_w1_a=(2, 8),
            hada_w1_b=(2, 6),
            hada_w2_a=(2, 8),
            hada_w2_b=(2, 6),
            hada_t1=(2, 2, 3, 3),
        ),
        "LoHa lacks 'hada_t2'",
    ),
    "missing lokr": (shapes(lokr_w1=(2, 2), lokr_w2_a=(4, 2)), "LoKr lacks 'lokr_w2_b'"),
    "rank": (shapes(**{UP: (8, 2), DOWN: (3, 6)}), "rank: up says 2, down says 3"),
    "rank of mid": (
        shapes(**{UP: (8, 2), DOWN: (3, 6), "lora_mid__weight": (2, 4, 3, 3)}),
        "rank: mid says 4, down says 3",
    ),
    "rank of halves": (
        shapes(hada_w1_a=(8, 2), hada_w1_b=(2, 6), hada_w2_a=(8, 3), hada_w2_b=(3, 6)),
        "hada_w1 says 2, hada_w2 says 3",
    ),
    "sizes of halves": (
        shapes(hada_w1_a=(8, 2), hada_w1_b=(2, 6), hada_w2_a=(8, 2), hada_w2_b=(2, 7)),
        "hada_w1 makes 8 x 6, hada_w2 8 x 7",
    ),
    "mixed": (shapes(**{UP: (8, 2), DOWN: (2, 6), "hada_w1_a": (8, 2)}), "mixes kinds"),
    "set and diff": (shapes(set_weight=(8, 6), diff=(8, 6)), "mixes kinds"),
    "dora of oft": (shapes(oft_blocks=(4, 2, 2), dora_scale=(8, 1)), "does not go with"),
    "both doras": (
        shapes(**{UP: (8, 2), DOWN: (2, 6), "dora_scale": (8, 1), "lora_magnitude_vector": (8,)}),
        "does not go with",
    ),
    "scale of oft": (shapes(oft_blocks=(4, 2, 2), scale=()), "OFT has no scale"),
    "extra part": (
        shapes(lokr_w1=(2, 2), lokr_w1_a=(2, 1), lokr_w2=(4, 3)),
        "LoKr has no part 'lokr_w1_a'",
    ),
    "alpha of two": (shapes(**{UP: (8, 2), DOWN: (2, 6), "alpha": (2,)}), "should be one number"),
    "vector": (shapes(**{UP: (8,), DOWN: (2, 6)}), r"up is \[8\]"),
    "empty": (shapes(**{UP: (8, 0), DOWN: (0, 6)}), r"up is \[8, 0\]"),
    "kernel in up": (shapes(**{UP: (8, 2, 3, 3), DOWN: (2, 6)}), "up is a kernel"),
    "mid no kernel": (
        shapes(**{UP: (8, 2), DOWN: (2, 6), "lora_mid__weight": (2, 2)}),
        "mid should be the kernel",
    ),
    "t no kernel": (
        shapes(
            hada_w1_a=(2, 8),
            hada_w1_b=(2, 6),
            hada_w2_a=(2, 8),
            hada_w2_b=(2, 6),
            hada_t1=(2, 2),
            hada_t2=(2, 2),
        ),
        "should be a kernel",
    ),
    "lokr t no kernel": (
        shapes(lokr_w1=(2, 2), lokr_t2=(2, 2), lokr_w2_a=(2, 4), lokr_w2_b=(2, 3)),
        "should be a kernel",
    ),
    "glora": (
        shapes(a1__weight=(6, 2), a2__weight=(2, 5), b1__weight=(8, 2), b2__weight=(2, 6)),
        "neither layout of GLoRA",
    ),
    "glora columns": (
        shapes(a1__weight=(5, 2), a2__weight=(2, 5), b1__weight=(8, 2), b2__weight=(2, 6)),
        "a is for 5 inputs",
    ),
    "glora bm": (
        shapes(
            a1__weight=(6, 2),
            a2__weight=(2, 6),
            b1__weight=(8, 2),
            b2__weight=(2, 6),
            bm__weight=(2, 2),
        ),
        "bm is",
    ),
    "oft blocks": (shapes(oft_blocks=(4, 2, 3)), "should be"),
    "oft rescale": (shapes(oft_blocks=(4, 2, 2), rescale=(7, 1)), "rescale is"),
    "boft blocks": (shapes(oft_blocks=(2, 4, 3, 3)), "stages need"),
    "boft square": (shapes(oft_blocks=(2, 4, 2, 3)), "should be"),
    "boft rescale": (shapes(oft_blocks=(2, 4, 2, 2), rescale=(7, 1)), "rescale is"),
    "oft_R": (shapes(oft_R__weight=(4, 7)), "upper triangles"),
    "oft_R without config": (shapes(oft_R__weight=(4, 6)), "use_cayley_neumann"),
    "ia3 of a conv": (shapes(ia3_l=(1, 8, 1, 1)), "inputs or outputs"),
    "on_input": (shapes(weight=(8,), on_input=(2,)), "on_input is"),
    "b_norm": (shapes(w_norm=(8,), b_norm=(7,)), "w_norm has 8 numbers, b_norm 7"),
    "diff_b": (shapes(diff=(8, 6), diff_b=(7,)), "diff_b has 7 numbers"),
    "diff of nothing": (shapes(diff=()), "diff is"),
    "lora_bias": (
        shapes(lora_A__weight=(2, 6), lora_B__weight=(8, 2), lora_B__bias=(7,)),
        "the bias is",
    ),
    "integers": (
        {n: TensorSpec(n, "I64", s.shape) for n, s in shapes(**{UP: (8, 2), DOWN: (2, 6)}).items()},
        "I64, not a number",
    ),
    "alpha that is no number": (
        shapes(**{UP: (8, 2), DOWN: (2, 6)}) | {"x.alpha": TensorSpec("x.alpha", "BOOL", ())},
        "alpha is BOOL, not a number",
    ),
    "indices alone": (
        shapes(**{UP: (8, 2), DOWN: (2, 6)})
        | {"x.bias_indices": TensorSpec("x.bias_indices", "I64", (2, 3))},
        r"bias_indices \[2, 3\] and bias_values missing",
    ),
    "indices of others": (
        shapes(**{UP: (8, 2), DOWN: (2, 6), "bias_values": (4,)})
        | {"x.bias_indices": TensorSpec("x.bias_indices", "I64", (2, 3))},
        r"bias_values \[4\]",
    ),
    "two schemes": (
        shapes(**{UP: (8, 2), DOWN: (2, 6), "lora_A__weight": (2, 6)}),
        "two parts 'down': 'x.lora_A.weight' and 'x.lora_down.weight'",
    ),
    "strangers": (shapes(running_mean=(8,)), "1 tensor is no part of an adapter"),
    "a lonely weight": (shapes(weight=(8,)), "no part of an adapter: 'x.weight'"),
}


@pytest.mark.parametrize("why", BAD)
def test_bad_modules_are_named(why):
    specs, message = BAD[why]
    with pytest.raises(InputError, match=message) as caught:
        group(specs, {})
    assert caught.value.where.startswith("x")


def test_all_errors_come_at_once():
    specs = {
        name: TensorSpec(name, "F32", (4, 4))
        for name in ("a.lora_up.weight", "b.lora_down.weight", "c.running_mean")
    }
    with pytest.raises(ManyErrors) as caught:
        group(specs, {})
    assert [error.where for error in caught.value.errors] == ["c.running_mean", "a", "b"]


@pytest.mark.parametrize(
    ("metadata", "config", "message"),
    [
        ({"lora_adapter_metadata": "{"}, None, "not JSON"),
        ({"lora_adapter_metadata": "[]"}, None, "not an object"),
        ({}, {"r": 9, "lora_alpha": 1}, "parts say rank 4, PEFT's config 9"),
        ({}, {"r": 4, "lora_alpha": "big"}, "'big', not a number"),
        ({}, {"r": 4, "alpha_pattern": {"(": 1}}, "no regular expression"),
    ],
)
def test_bad_configs_are_named(metadata, config, message):
    with pytest.raises(InputError, match=message):
        group(specs_of(LORA), metadata, config=config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": "x"}, "not numbers"),
        ({"use_cayley_neumann": False, "coft": True, "eps": "x"}, "not numbers"),
    ],
)
def test_bad_oft_configs_are_named(config, message):
    with pytest.raises(InputError, match=message):
        group(shapes(oft_R__weight=(4, 6)), {}, config=config)


PEFT_SETTINGS = {"feedforward_modules": ["x"], "use_cayley_neumann": False, "block_share": True}
LOCON = {"x.lora_up.weight": torch.ones(8, 2), "x.lora_down.weight": torch.ones(2, 4, 3, 3)}
IA3 = {"x.weight": torch.ones(8), "x.on_input": torch.tensor(1)}
GLORA = {
    "x.a1.weight": torch.ones(12, 2),
    "x.a2.weight": torch.ones(2, 12),
    "x.b1.weight": torch.ones(8, 2),
    "x.b2.weight": torch.ones(2, 24),
}


@pytest.mark.parametrize(
    ("tensors", "shape", "fits"),
    [
        (LORA, (8, 6), True),
        (LORA, (8, 6, 1, 1), True),
        (LORA, (8, 5), False),
        (LORA, (9, 6), False),
        (LORA | {"x.dora_scale": torch.ones(8, 1)}, (8, 6), True),
        (LORA | {"x.dora_scale": torch.ones(1, 6)}, (8, 6), True),
        (LORA | {"x.dora_scale": torch.ones(1, 7)}, (8, 6), False),
        ({"x.w_norm": torch.ones(8)}, (8,), True),
        ({"x.oft_blocks": torch.ones(4, 2, 2)}, (8, 99, 3, 3), True),
        ({"x.oft_blocks": torch.ones(4, 2, 2)}, (9, 99), False),
        (LOCON, (8, 4, 3, 3), True),
        (LOCON, (8, 4, 1, 9), False),
        (LOCON, (8, 4, 9), False),
        (LOCON, (8, 36), False),
        ({"x.diff": torch.ones(8, 36)}, (8, 4, 3, 3), True),
        ({"x.diff": torch.ones(8, 9, 4)}, (8, 4, 3, 3), False),
        ({"x.lokr_w1": torch.ones(2, 2), "x.lokr_w2": torch.ones(4, 2, 3, 1)}, (8, 4, 3, 1), True),
        ({"x.lokr_w1": torch.ones(2, 2), "x.lokr_w2": torch.ones(4, 2, 3, 1)}, (8, 4, 1, 3), False),
        (IA3, (8, 6), True),
        (IA3, (6, 8, 3, 3), True),
        (IA3, (6, 4, 2, 1), False),
        ({"x.ia3_l": torch.ones(1, 8)}, (6, 8), True),
        ({"x.ia3_l": torch.ones(1, 8)}, (8, 6), False),
        ({"x.ia3_l": torch.ones(1, 8, 1, 1)}, (6, 8, 3, 3), True),
        ({"x.ia3_l": torch.ones(1, 8, 1, 1)}, (8, 6, 3, 3), False),
        (GLORA, (8, 6, 2, 2), False),
        (GLORA, (8, 12, 2, 1), True),
        ({"x.oft_R.weight": torch.ones(1, 6)}, (3, 8), True),
        ({"x.oft_R.weight": torch.ones(1, 6)}, (8, 6), False),
    ],
)
def test_misfit(tensors, shape, fits):
    module, _, _ = read(tensors, config=PEFT_SETTINGS)
    assert (module.misfit(shape) == "") is fits


def test_a_change_of_another_size_is_refused():
    module, parts, scale = read(LORA)
    with pytest.raises(InputError, match="the adapter's change is"):
        bake_weight(module, torch.ones(8, 5), parts, scale=scale)


@pytest.mark.parametrize(
    ("feedforward", "on_input"),
    [
        (["conv1"], 1.0),
        (["down.conv1"], 1.0),
        (["conv2", "down"], 0.0),
        (r".*\.conv1", 1.0),
        ("conv1", 0.0),
    ],
)
def test_peft_config_tells_which_ia3_scales_inputs(feedforward, on_input):
    """A list holds ends of names, a string is a regular expression for whole names."""
    spec = TensorSpec("base_model.model.down.conv1.ia3_l", "F32", (1, 8, 1, 1))

    file = group({spec.name: spec}, {}, config={"feedforward_modules": feedforward})

    (module,) = file.modules.values()
    assert module.settings == {"on_input": on_input}
    assert module.touches_bias == ("no" if on_input else "if-any")


def test_registry_refuses_nonsense():
    lora, oft = load_kinds()["lora"], load_kinds()["oft"]
    with pytest.raises(TypeError, match="use apply"):
        oft.delta({}, (8, 6), 1.0)
    with pytest.raises(ValueError, match="registered twice"):
        register(lora)
    with pytest.raises(ValueError, match="either rows or apply"):
        register(replace(lora, name="new", rows=None))


def test_bias_alone_leaves_the_weight():
    layer = make_layer("linear")

    weight, bias, module = bake({"x.diff_b": torch.ones(24)}, layer)

    assert not module.touches_weight
    assert torch.equal(weight, layer.weight)
    assert torch.equal(bias, layer.bias + 1)


def test_listing_kinds_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, ckptools.lora as l; l.load_kinds(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
