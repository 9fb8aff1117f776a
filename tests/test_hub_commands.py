"""Commands over models that lie on the Hub: what they say, what is fetched for it, what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_sources import hub_in
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file

import ckptools
from ckptools.cli import run
from ckptools.hubref import HubRef, cached_ref, short_name, shown

TINY = Path(ckptools.__file__).parent / "tiny"
A, B, GLOW = (TINY / f"{name}.safetensors" for name in ("A", "B", "glow"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub with two models and an adapter."""
    with hub_in(tmp_path, monkeypatch) as server:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own-cache"))
        monkeypatch.chdir(tmp_path)
        for name, path in (("a", A), ("b", B), ("glow", GLOW)):
            server.put(f"alice/{name}", {f"{path.name}": path}, private=False)
        yield server


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def fetched(hub: LoopbackHub) -> list[str]:
    """The whole files that were sent."""
    return [one.path for one in hub.requests("GET", "/cdn/") if "Range" not in one.headers]


def at(hub: LoopbackHub, repo: str) -> str:
    """What a file of alice's repository is called with its commit."""
    commit = hub.repos[f"alice/{repo}"].branches["main"]
    name = next(name for name in hub.files(f"alice/{repo}") if name.endswith(".safetensors"))
    return f"hf://alice/{repo}/{name}@{commit}"


def same_but_paths(
    capsys: pytest.CaptureFixture[str], remote: list[str], local: list[str], code: int = 0
) -> tuple[str, str]:
    """What two command lines say as JSON, without the keys that name files; both exit alike."""
    said = []
    for words in (remote, local):
        assert run([*words, "--json"]) == code
        said.append(capsys.readouterr().out)
    return said[0], said[1]


def test_paths_in_the_cache_are_shown_as_what_they_are_on_the_hub(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "models--alice--a.b" / "snapshots" / commit

    assert cached_ref(root / "v/m.safetensors") == HubRef("alice/a.b", "v/m.safetensors", commit)
    assert shown(root / "m.safetensors") == f"hf://alice/a.b/m.safetensors@{commit}"
    assert shown(root) == f"hf://alice/a.b@{commit}"
    assert (short_name(root), short_name(root / "m.safetensors")) == ("a.b", "m")
    for other in (root.parent, root.parent / "main" / "m", tmp_path / "m.safetensors"):
        assert cached_ref(other) is None
        assert shown(other) == str(other)


def test_hash_fetches_and_says_what_it_says_of_the_file(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    remote, local = same_but_paths(capsys, ["hash", "hf://alice/a"], ["hash", str(A)])

    assert remote.replace(at(hub, "a"), "X") == local.replace(str(A), "X")
    assert len(fetched(hub)) == 1
    assert run(["hash", "hf://alice/a"]) == 0
    assert capsys.readouterr().out.startswith(f"{at(hub, 'a')}: ")
    assert len(fetched(hub)) == 1  # the second time it was in the cache


def test_a_fetched_file_that_is_not_the_hubs_is_refused(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = hub.repos["alice/a"].commits[hub.repos["alice/a"].branches["main"]].files[A.name]
    data = bytearray(A.read_bytes())
    data[-1] ^= 1
    hub.object_path(entry.sha256).write_bytes(data)

    assert run(["hash", "hf://alice/a", "--json"]) == 4
    error = answer(capsys)["error"]
    assert isinstance(error, dict)
    assert "is not the Hub's: its sha256 is" in error["message"]


def test_a_branch_means_one_commit_for_all_sources_of_a_command(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    first = at(hub, "a")
    hub.fail("GET", "/cdn/", before=lambda: hub.put("alice/a", {A.name: B}, private=False) and None)

    assert run(["hash", "hf://alice/a", "hf://alice/a@main", "--json"]) == 0
    sources = answer(capsys)["sources"]
    assert isinstance(sources, list)
    assert [one["path"] for one in sources] == [first, first]


def test_verify_reads_the_header_alone_unless_values_are_asked_for(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = ["verify", f"hf://alice/a/{A.name}", "--expect", "sd1"]
    said, local = same_but_paths(capsys, remote, ["verify", str(A), "--expect", "sd1"])
    assert said.replace(f"hf://alice/a/{A.name}", "X") == local.replace(str(A), "X")
    assert len(hub.log) == 2
    assert fetched(hub) == []

    said, local = same_but_paths(
        capsys, ["verify", "hf://alice/a", "--deep"], ["verify", str(A), "--deep"]
    )
    assert said.replace(at(hub, "a"), "X") == local.replace(str(A), "X")
    assert len(fetched(hub)) == 1


def test_verify_finds_what_is_wrong_in_a_header_on_the_hub(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.put("alice/cut", {"cut.safetensors": A.read_bytes()[:-1000]}, private=False)

    assert run(["verify", "hf://alice/cut", "--json"]) == 1
    assert "truncated" in capsys.readouterr().out


def test_inspect_fetches_for_statistics_alone(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "hf://alice/a", "--json"]) == 0
    assert answer(capsys)["file"] == "hf://alice/a"
    assert fetched(hub) == []
    assert run(["inspect", "hf://alice/a", "--stats", "--json"]) == 0
    found = answer(capsys)

    assert found["file"] == at(hub, "a")
    assert found["statistics"]
    assert len(fetched(hub)) == 1


def test_kinship_and_diff_name_models_on_the_hub(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["kinship", "hf://alice/a", str(B), "--base", "hf://alice/b"]
    remote, local = same_but_paths(capsys, words, ["kinship", str(A), str(B), "--base", str(B)])
    for repo, path in (("a", A), ("b", B)):
        remote = remote.replace(at(hub, repo), str(path))
    assert remote == local

    assert run(["diff", "hf://alice/a", "hf://alice/b", "--json"]) == 0
    found = answer(capsys)
    assert (found["a"], found["b"]) == (at(hub, "a"), at(hub, "b"))


def test_convert_writes_the_bytes_that_it_writes_of_the_file(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    assert run(["convert", "hf://alice/a", "remote.safetensors", "--dtype", "fp16", "-q"]) == 0
    assert run(["convert", str(A), "local.safetensors", "--dtype", "fp16", "-q"]) == 0

    remote, local = (tmp_path / f"{name}.safetensors" for name in ("remote", "local"))
    assert remote.read_bytes() == local.read_bytes()


def test_check_takes_models_of_the_hub(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--against", "hf://alice/b", "--quick"]
    assert run(["check", "hf://alice/a", *words, "--json"]) == 0
    found = answer(capsys)
    assert run(["check", str(A), "--against", str(B), "--quick", "--json"]) == 0

    assert found["checks"] == answer(capsys)["checks"]


def test_render_draws_models_of_the_hub_into_this_folder(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--steps", "2", "--size", "64", "-p", "a red circle", "--json"]
    code = run(["render", "hf://alice/a", "--beside", "hf://alice/b", *words])
    found = answer(capsys)

    assert code in (0, 1), found  # two steps need not pass
    assert (tmp_path / "A-render" / "report.json").is_file()
    assert str(tmp_path / "cache") not in (tmp_path / "A-render" / "report.json").read_text()
    assert len(fetched(hub)) == 2


# --- adapters ----------------------------------------------------------------------------------


def test_an_adapter_is_fetched_for_its_alphas(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptools.hub.remote.FIRST_READ_BYTES", 20_000)
    words = ["lora", "inspect", f"hf://alice/glow/{GLOW.name}"]
    remote, local = same_but_paths(capsys, words, ["lora", "inspect", str(GLOW)])

    assert remote.replace(words[-1], "X") == local.replace(str(GLOW), "X")
    assert len(fetched(hub)) == 1


def peft_adapter(path: Path) -> Path:
    """The glow adapter in PEFT's way: no alpha in the file, one in the config beside it."""
    tensors = load_file(GLOW)
    names = {name.partition(".")[0] for name in tensors}
    peft = {}
    for name in names:
        if not name.startswith("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn"):
            continue
        block, _, layer = name.removeprefix(
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
        ).partition("_")
        layer = {"to_out_0": "to_out.0"}.get(layer, layer)
        full = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.{block}.{layer}"
        peft[f"{full}.lora_A.weight"] = tensors[f"{name}.lora_down.weight"].contiguous()
        peft[f"{full}.lora_B.weight"] = tensors[f"{name}.lora_up.weight"].contiguous()
    assert peft
    path.parent.mkdir()
    peft["unet.padding.lora_A.weight"] = torch.zeros(8, 64_000)
    peft["unet.padding.lora_B.weight"] = torch.zeros(8, 8)
    save_file(peft, path)
    (path.parent / "adapter_config.json").write_text('{"lora_alpha": 2, "r": 8}')
    return path


def test_an_adapter_whose_alpha_is_in_its_config_is_read_by_its_header(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = peft_adapter(tmp_path / "peft" / "adapter_model.safetensors")
    config = path.with_name("adapter_config.json")
    hub.put("alice/peft", {path.name: path, config.name: config}, private=False)
    assert path.stat().st_size > 2_000_000

    words = ["lora", "inspect", "hf://alice/peft"]
    remote, local = same_but_paths(capsys, words, ["lora", "inspect", str(path)])

    assert remote.replace(words[-1], "X") == local.replace(str(path), "X")
    assert [*json.loads(remote)["alphas"]] in (["2"], ["2.0"])
    assert fetched(hub) == []


def test_what_is_no_adapter_is_said_so_and_not_fetched(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["lora", "inspect", "hf://alice/a"]) == 2

    assert "hf://alice/a: this is a whole model, not an adapter" in capsys.readouterr().err
    assert fetched(hub) == []


def test_adapters_of_the_hub_are_checked_extracted_and_merged(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lora", "check", "hf://alice/glow", "--against", "hf://alice/a"]
    remote, local = same_but_paths(capsys, words, ["lora", "check", str(GLOW), "--against", str(A)])
    assert json.loads(remote)["matched"] == json.loads(local)["matched"] > 0
    files = {"remote": ("hf://alice/a", "hf://alice/b", "hf://alice/glow"),
             "local": (str(A), str(B), str(GLOW))}  # fmt: skip
    for folder, (a, b, glow) in files.items():
        (tmp_path / folder).mkdir()
        made, halved = f"{folder}/made.safetensors", f"{folder}/halved.safetensors"
        assert run(["lora", "extract", a, b, "-o", made, "--rank", "2", "-q"]) == 0
        assert run(["lora", "merge", glow, "--weights", "0.5", "-o", halved, "-q"]) == 0

    for name in ("made.safetensors", "halved.safetensors"):
        remote_file, local_file = tmp_path / "remote" / name, tmp_path / "local" / name
        assert remote_file.read_bytes() == local_file.read_bytes()


def test_a_folder_of_the_hub_is_one_model(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    assert run(["convert", str(A), str(folder), "-q"]) == 0
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    hub.put("alice/d", files, private=False)

    remote, local = same_but_paths(
        capsys, ["verify", "hf://alice/d", "--deep"], ["verify", str(folder), "--deep"]
    )
    commit = hub.repos["alice/d"].branches["main"]
    assert remote.replace(f"hf://alice/d@{commit}", "X") == local.replace(str(folder), "X")
    assert run(["verify", "hf://alice/d", "--json"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["hash", "hf://alice/none"],
        ["verify", "hf://alice/none"],
        ["kinship", "hf://alice/a", "hf://alice/none"],
        ["convert", "hf://alice/none", "x.safetensors"],
        ["lora", "inspect", "hf://alice/none"],
        ["lora", "check", "hf://alice/glow", "--against", "hf://alice/none"],
        ["check", "hf://alice/none"],
        ["render", "hf://alice/none"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_the_hub_does_not_give_is_exit_code_4(
    hub: LoopbackHub, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 4
    assert "no such repository" in capsys.readouterr().err
    assert not Path("x.safetensors").exists()
