"""The test models themselves: narrow files are still what they are taken from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import layout, model_values, shrunk, with_channels, write_model

from ckptools.family import detect
from ckptools.sources import open_checkpoint

CHECKPOINTS = [
    ("sd1", "sd1", "base"),
    ("sd1-inpainting", "sd1", "inpainting"),
    ("sd1-ip2p", "sd1", "ip2p"),
    ("sd2", "sd2", "base"),
    ("sd2-inpainting", "sd2", "inpainting"),
    ("sd2-depth", "sd2", "depth"),
    ("sdxl", "sdxl", "base"),
    ("sdxl-refiner", "sdxl-refiner", "base"),
]


@pytest.mark.parametrize("factor", [8, 32])
@pytest.mark.parametrize(("name", "family", "variant"), CHECKPOINTS)
def test_a_shrunk_layout_is_still_its_family(
    name: str, family: str, variant: str, factor: int
) -> None:
    specs = shrunk(name, factor)

    found = detect(specs)

    assert (found.family, found.variant) == (family, variant)
    assert list(specs) == list(layout(name))
    assert sum(spec.numel for spec in specs.values()) * factor < sum(
        spec.numel for spec in layout(name).values()
    )


@pytest.mark.parametrize(("channels", "variant"), [(4, "base"), (9, "inpainting"), (8, "ip2p")])
def test_the_number_of_input_channels_makes_the_variant(channels: int, variant: str) -> None:
    assert detect(with_channels(shrunk("sd1"), channels)).variant == variant


def test_values_depend_on_the_name_and_the_seed_only(tmp_path: Path) -> None:
    specs = shrunk("sd1")
    some = dict(list(specs.items())[100:200])

    whole, part = model_values(specs, seed=1), model_values(some, seed=1)
    other = model_values(some, seed=2)
    path = write_model(tmp_path / "m.safetensors", some, seed=1, dtype="BF16")

    assert all(torch.equal(part[name], whole[name]) for name in some)
    assert not any(torch.equal(part[name], other[name]) for name in some)
    with open_checkpoint(path) as opened:
        assert {spec.dtype for spec in opened.values()} == {"BF16"}
