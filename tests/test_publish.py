"""Publishing, with the real client against a Hub on this machine: what arrives, what breaks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, constants, hf_hub_download
from loopback_hub import LoopbackHub
from models import shrunk, write_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptools
from ckptools.cli import run
from ckptools.errors import CkptError, NetworkError, UnsafeError, UsageError, VerificationError
from ckptools.hub.card import Parent
from ckptools.hub.upload import Hub
from ckptools.publication import Gathered, Order, Published, gather, make_publication, publish
from ckptools.recipe import load_recipe
from ckptools.report_publish import show_publication
from ckptools.workflow import merge

# The client's own way of sending open files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "alice/mixed"
TINY = Path(ckptools.__file__).parent / "tiny" / "A.safetensors"
RECIPE = """\
ckptools: 1
models: {A: A.safetensors, B: B.safetensors, C: C.safetensors}
params: {M: {default: 0.5, unet: 0.25}}
merge: A + (B - C) * M
output: {path: mixed.safetensors}
publish: {repo: alice/mixed, tags: [test]}
"""
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
REPORT: dict[str, Any] = {
    "verdict": "pass",
    "images": [
        {"file": "a.png", "model": "A", "prompt": "a red circle", "seed": 1},
        {"file": "m.png", "model": "mixed", "prompt": "a red circle", "seed": 1},
    ],
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three parents under one licence, and what a merge of them wrote."""
    folder = tmp_path_factory.mktemp("merged")
    for seed, name in enumerate("ABC", 1):
        path = write_model(folder / f"{name}.safetensors", shrunk("sd1", 64), seed=seed)
        save_file(load_file(path), path, {"modelspec.license": "CreativeML Open RAIL-M"})
    (folder / "recipe.yaml").write_text(RECIPE)
    merge(load_recipe(folder / "recipe.yaml"), hash_inputs=True)
    return folder


@pytest.fixture
def model(merged: Path, tmp_path: Path) -> Path:
    """A copy of the merged file, its manifest and its recipe, to change at will."""
    folder = tmp_path / "work"
    folder.mkdir()
    for path in merged.iterdir():
        if not re.fullmatch(r"[ABC]\.safetensors", path.name):
            shutil.copy2(path, folder)
    return folder / "mixed.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub without Xet, to which the client in this process is logged in."""
    with LoopbackHub(tmp_path / "hub") as server:
        log_in(server, tmp_path, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


def log_in(server: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


_GATHERED: dict[object, Gathered] = {}


def gathered(path: Path) -> Gathered:
    """`gather`, once for equal folders: it reads every value."""
    stats = [(file.name, file.stat()) for file in sorted(path.parent.rglob("*"))]
    key = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    if key not in _GATHERED:
        _GATHERED[key] = gather(path, Order())
    return _GATHERED[key]


@dataclass
class Client:
    """Our side: the real client, a clock that does not wait, and what was told."""

    server: LoopbackHub
    waits: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    @property
    def hub(self) -> Hub:
        api = HfApi(endpoint=self.server.url, token=self.server.token)
        return Hub(api, self.told.append, self.waits.append)

    def publish(self, path: Path, **order: object) -> Published:
        wanted = Order(**{"repo": REPO, **order})  # type: ignore[arg-type]
        return publish(replace(gathered(path), order=wanted), self.hub)


@pytest.fixture
def client(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Client:
    found = Client(hub)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", found.waits.append)
    return found


def add_render(model: Path, **changed: object) -> Path:
    folder = model.with_name("mixed-render")
    folder.mkdir()
    for name in ("a.png", "m.png", "sheet.png"):
        (folder / name).write_bytes(PNG + name.encode())
    (folder / "report.html").write_text("<p>fine</p>")
    (folder / "report.json").write_text(json.dumps(report_on(model) | changed))
    return folder


def report_on(model: Path) -> dict[str, Any]:
    """What a test render of the model would report."""
    own = {"file": model.name, "sha256": [hashlib.sha256(model.read_bytes()).hexdigest()]}
    return REPORT | {"models": {"A": {"file": "A.safetensors", "sha256": ["0" * 64]}, "mixed": own}}


def weights_sent(hub: LoopbackHub) -> int:
    return len(hub.requests("PUT"))


# --- what arrives --------------------------------------------------------------------------------


def test_what_is_published_comes_back_bit_for_bit(
    client: Client, model: Path, tmp_path: Path
) -> None:
    add_render(model)
    model.with_name("LICENSE").write_text("be nice")
    done = client.publish(model, tag="v1", message="First")

    repo = client.server.repos[REPO]
    head = repo.commit_of("main")
    assert head
    assert head.oid == done.revision == repo.tags["v1"]
    assert repo.private
    assert len(repo.commits) == 2  # the Hub's own, and one of ours
    assert head.title == "First"
    assert client.server.files(REPO) == {
        "mixed.safetensors", "mixed.safetensors.ckptools.json", "recipe.yaml", "README.md",
        "LICENSE", "renders/a.png", "renders/m.png", "renders/sheet.png", "renders/report.html",
        "renders/report.json",
    }  # fmt: skip
    for local, path in (
        (model, "mixed.safetensors"),
        (model.with_name("mixed.safetensors.ckptools.json"), "mixed.safetensors.ckptools.json"),
        (model.with_name("mixed-render") / "m.png", "renders/m.png"),
    ):
        fetched = hf_hub_download(
            REPO, path, endpoint=client.server.url, token=client.server.token,
            cache_dir=tmp_path / "fetched",
        )  # fmt: skip
        assert Path(fetched).read_bytes() == local.read_bytes()


def test_the_recipe_that_is_published_makes_the_same_bytes(
    client: Client, model: Path, merged: Path, tmp_path: Path
) -> None:
    client.publish(model)
    for name in "ABC":
        (tmp_path / f"{name}.safetensors").symlink_to(merged / f"{name}.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(client.server.content(REPO, "recipe.yaml"))
    again = merge(load_recipe(recipe), hash_inputs=True)

    assert again.output.read_bytes() == model.read_bytes()


def test_publishing_twice_sends_nothing_the_second_time(client: Client, model: Path) -> None:
    first = client.publish(model, tag="v1")
    client.server.log.clear()
    second = client.publish(model, tag="v1")

    assert second.committed is None
    assert second.revision == first.revision
    assert second.publication.is_up_to_date
    assert not client.server.requests("PUT")
    assert not client.server.requests("POST", "/commit/|/preupload/|/create")


def test_a_change_sends_what_changed_only(client: Client, model: Path) -> None:
    client.publish(model)
    model.with_name("LICENSE").write_text("be nice")
    client.publish(model)

    assert weights_sent(client.server) == 1
    assert len(client.server.repos[REPO].commits) == 3
    assert "LICENSE" in client.server.files(REPO)


def test_a_branch_is_made_and_main_stays(client: Client, model: Path) -> None:
    client.publish(model, branch="next")

    assert client.server.files(REPO) == set()
    assert "mixed.safetensors" in client.server.files(REPO, "next")


def test_a_pull_request_leaves_main_as_it_is(client: Client, model: Path) -> None:
    client.server.create(REPO, private=False)
    done = client.publish(model, as_pull_request=True)

    assert done.committed
    assert done.committed.pull_request.endswith("/discussions/1")
    assert client.server.files(REPO) == set()
    assert "mixed.safetensors" in client.server.files(REPO, "refs/pr/1")


def test_shards_and_their_index_are_published(client: Client, merged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in "ABC":
        (folder / f"{name}.safetensors").symlink_to(merged / f"{name}.safetensors")
    text = RECIPE.replace("mixed.safetensors}", "mixed.safetensors, dtype: fp32, shard_size: 1MB}")
    (folder / "recipe.yaml").write_text(text)
    result = merge(load_recipe(folder / "recipe.yaml"))
    client.publish(result.output)

    names = client.server.files(REPO)
    assert {"mixed.safetensors.index.json", "mixed.safetensors.ckptools.json"} <= names
    assert sum(name.endswith(".safetensors") for name in names) >= 2


def test_a_diffusers_folder_is_published(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    assert run(["convert", str(TINY), str(folder), "-q"]) == 0
    client.publish(folder)

    local = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert client.server.files(REPO) == local | {"README.md"}
    assert b"library_name: diffusers" in client.server.content(REPO, "README.md")
    (folder / "README.md").write_text("mine")
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        here = gather(Path(), Order())
    assert here.facts.title == "folder"
    assert "README.md of the folder is not sent" in " ".join(here.notes)
    (folder / "vae" / "old.bin").write_bytes(b"x")
    with pytest.raises(UnsafeError, match="pickle"):
        gather(folder, Order())


def test_xet_carries_the_weights_where_the_hub_has_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackHub(tmp_path / "hub", xet=True) as server:
        log_in(server, tmp_path, monkeypatch)
        client = Client(server)
        client.publish(model)

        assert not server.requests("PUT")
        assert server.content(REPO, "mixed.safetensors") == model.read_bytes()
        assert client.told == []


def test_large_files_go_in_parts(client: Client, model: Path) -> None:
    client.server.part_bytes = 200_000
    client.publish(model)

    assert weights_sent(client.server) == -(-model.stat().st_size // 200_000)
    assert client.server.content(REPO, "mixed.safetensors") == model.read_bytes()


def test_without_xet_on_the_other_side_it_goes_over_lfs_and_says_so(
    client: Client, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    client.publish(model)

    assert client.server.content(REPO, "mixed.safetensors") == model.read_bytes()
    assert client.told == ["the Hub does not take files over Xet now; sending them over LFS"]
    assert weights_sent(client.server) == 1
    add_render(model)
    client.publish(model)
    assert client.server.content(REPO, "renders/m.png").endswith(b"m.png")


# --- what breaks ---------------------------------------------------------------------------------


def test_a_commit_is_tried_again_while_the_hub_is_busy(client: Client, model: Path) -> None:
    client.server.fail("POST", "/commit/", status=503, times=2)
    client.publish(model)

    assert len(client.server.requests("POST", "/commit/")) == 3
    assert len(client.waits) == 2
    assert client.waits[0] < client.waits[1] + 2
    assert weights_sent(client.server) == 1


def test_retry_after_is_obeyed(client: Client, model: Path) -> None:
    client.server.fail("POST", "/commit/", status=429, retry_after=17)
    client.publish(model)

    assert client.waits == [17.0]
    assert "mixed.safetensors" in client.server.files(REPO)


def test_a_hub_that_stays_busy_ends_in_an_error_and_the_next_run_finishes(
    client: Client, model: Path
) -> None:
    client.server.fail("POST", "/commit/", status=503, times=99)
    with pytest.raises(NetworkError, match="503") as caught:
        client.publish(model)
    assert "not sent twice" in caught.value.fix
    assert client.server.files(REPO) == set()
    client.server.faults.clear()
    client.publish(model)

    assert weights_sent(client.server) == 1
    assert client.server.content(REPO, "mixed.safetensors") == model.read_bytes()


@pytest.mark.parametrize("status", [412, 409])
def test_a_branch_that_moved_is_planned_again(client: Client, model: Path, status: int) -> None:
    client.server.fail("POST", "/commit/", status=status)
    client.publish(model)

    assert weights_sent(client.server) == 1
    assert "mixed.safetensors" in client.server.files(REPO)


def test_what_somebody_else_commits_meanwhile_is_kept(client: Client, model: Path) -> None:
    client.server.create(REPO)
    card = b"# Mine\n\nMy own words.\n"
    client.server.fail(
        "POST", "/commit/",
        before=lambda: client.server.put(REPO, {"notes.txt": b"n", "README.md": card}) and None,
    )  # fmt: skip
    client.publish(model)

    assert client.server.content(REPO, "notes.txt") == b"n"
    assert b"My own words." in client.server.content(REPO, "README.md")
    assert len(client.server.requests("POST", "/commit/")) == 2
    assert weights_sent(client.server) == 1


def test_a_lost_answer_does_not_commit_twice(client: Client, model: Path) -> None:
    client.server.fail("POST", "/commit/", lose_reply=True)
    done = client.publish(model)

    assert done.committed is None  # it was there when we looked again
    assert len(client.server.repos[REPO].commits) == 2
    assert "mixed.safetensors" in client.server.files(REPO)


def test_a_connection_cut_in_the_middle_of_the_weights(client: Client, model: Path) -> None:
    client.server.fail("PUT", "/lfs/", cut_after=1000)
    client.publish(model)

    assert weights_sent(client.server) == 2
    assert client.server.content(REPO, "mixed.safetensors") == model.read_bytes()


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/whoami", 401, "does not accept the token"),
        ("POST", "/repos/create", 403, "may not do that"),
        ("POST", "/preupload/", 403, "may not do that"),
        ("POST", "/commit/", 403, "may not do that"),
        ("POST", "/lfs/objects/batch", 401, "does not accept the token"),
    ],
)
def test_a_refusal_is_told_at_once_and_nothing_is_half_done(
    client: Client, model: Path, method: str, path: str, status: int, said: str
) -> None:
    client.server.fail(method, path, status=status, times=99)
    with pytest.raises(NetworkError, match=said) as caught:
        client.publish(model)

    assert client.server.token not in str(caught.value)
    assert client.waits == []
    assert not client.server.repos or client.server.files(REPO) == set()


def test_offline_means_offline(
    client: Client, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="OfflineModeIsEnabled"):
        client.publish(model)

    assert client.waits == []
    assert client.server.log == []


def test_a_token_that_may_only_read_is_refused_first(client: Client, model: Path) -> None:
    client.server.role = "read"
    with pytest.raises(NetworkError, match="may only read"):
        client.publish(model)

    assert not client.server.requests("POST")


def publish_until_killed(server: LoopbackHub, model: Path, folder: Path, **more: str) -> None:
    """Publish in another process, which ends when it commits."""
    environment = dict(os.environ) | {
        "HF_ENDPOINT": server.url, "HF_HOME": str(folder / "hf"), **more,
    }  # fmt: skip
    arguments = ["publish", str(model), "--repo", REPO]
    code = f"from ckptools.cli import run; run({arguments!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    server.fail("POST", "/commit/", status=500, before=lambda: os.kill(process.pid, signal.SIGKILL))
    assert process.wait(60) == -signal.SIGKILL
    assert server.files(REPO) == set()


def test_killed_between_upload_and_commit(client: Client, model: Path, tmp_path: Path) -> None:
    publish_until_killed(client.server, model, tmp_path, HF_HUB_DISABLE_XET="1")
    assert weights_sent(client.server) == 1
    client.publish(model)

    assert weights_sent(client.server) == 1
    assert client.server.content(REPO, "mixed.safetensors") == model.read_bytes()


class XetCounter:
    """In place of the client's progress bars: how many bytes Xet read, and how many it sent."""

    read, sent = 0, 0

    def update_progress(self, total: Any, items: object) -> None:
        XetCounter.read = total.total_bytes_completed
        XetCounter.sent = total.total_transfer_bytes_completed

    def close(self) -> None:
        """As bars have it."""


def test_killed_between_upload_and_commit_over_xet(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored() -> dict[str, tuple[int, int]]:
        """The blocks of chunks in Xet's store, and when they were written."""
        found = sorted((server.folder / "cas").rglob("xorbs/xorbs/default.*"))
        return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}

    reporter = "huggingface_hub.utils._xet_progress_reporting.XetUploadProgressReporter"
    monkeypatch.setattr(reporter, XetCounter)
    monkeypatch.setattr("huggingface_hub.utils.are_progress_bars_disabled", lambda: False)
    with LoopbackHub(tmp_path / "hub", xet=True) as server:
        log_in(server, tmp_path, monkeypatch)
        publish_until_killed(server, model, tmp_path)
        blocks = stored()
        assert sum(nbytes for nbytes, _ in blocks.values()) > model.stat().st_size / 2
        Client(server).publish(model)

        assert stored() == blocks
        assert (XetCounter.read, XetCounter.sent) == (model.stat().st_size, 0)
        assert server.content(REPO, "mixed.safetensors") == model.read_bytes()
        assert not server.requests("PUT")


def test_other_bytes_on_the_hub_than_were_sent_are_noticed(client: Client, model: Path) -> None:
    def swap() -> None:
        entry = client.server.repos[REPO].commits[client.server.repos[REPO].branches["main"]]
        data = client.server.stored(b"other")
        entry.files["mixed.safetensors"] = data  # type: ignore[index]  # a hub that errs

    client.server.fail("POST", "/paths-info/", skip=1, before=swap)
    with pytest.raises(VerificationError, match="not the one that was sent"):
        client.publish(model)


# --- what is refused -----------------------------------------------------------------------------


def test_a_public_repository_needs_a_word(client: Client, model: Path) -> None:
    client.server.create(REPO, private=False)
    with pytest.raises(UnsafeError, match="is public"):
        client.publish(model)
    client.publish(model, public=True)

    assert "mixed.safetensors" in client.server.files(REPO)


def test_a_new_repository_is_public_only_when_asked(client: Client, model: Path) -> None:
    client.publish(model, public=True)

    assert not client.server.repos[REPO].private


def test_a_private_repository_stays_private(client: Client, model: Path) -> None:
    client.server.create(REPO, private=True)
    done = client.publish(model, public=True)

    assert client.server.repos[REPO].private
    assert done.publication.visibility == "private"
    assert any("stays so" in note for note in done.publication.notes)


def test_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UnsafeError, match="pickle"):
        gather(path, Order(force_unchecked=True))


def test_unsound_weights_are_refused_unless_forced(model: Path) -> None:
    tensors = load_file(model)
    name = next(name for name, value in tensors.items() if value.is_floating_point())
    tensors[name].view(-1)[0] = float("nan")
    broken = model.with_name("broken.safetensors")
    save_file(tensors, broken)
    with pytest.raises(VerificationError, match="not sound"):
        gather(broken, Order())

    assert any("unchecked" in note for note in gather(broken, Order(force_unchecked=True)).notes)


def test_a_merge_whose_render_failed_is_refused_unless_forced(model: Path) -> None:
    add_render(model, verdict="fail")
    with pytest.raises(VerificationError, match="test render"):
        gather(model, Order())

    assert gather(model, Order(force_unchecked=True)).facts.verdict == "fail"


def test_a_render_of_other_weights_is_not_published(model: Path) -> None:
    folder = add_render(model, verdict="fail")
    other = {"mixed": {"file": model.name, "sha256": ["1" * 64]}}
    (folder / "report.json").write_text(json.dumps(report_on(model) | {"models": other}))
    found = gather(model, Order())

    assert not any(upload.path.startswith("renders/") for upload in found.uploads)
    assert (found.facts.verdict, found.facts.pictures) == ("", ())
    assert any("mixed-render/ shows other weights than these" in note for note in found.notes)


def test_the_folder_that_a_recipe_gives_its_pictures_is_looked_at(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_render(model, verdict="fail").rename(model.with_name("pictures"))
    recipe = model.with_name("recipe.yaml")
    recipe.write_text(RECIPE + "render: {when: never, folder: pictures}\n")

    assert run(["publish", str(recipe), "--dry-run"]) == 1
    assert "pictures/report.json: the test render of this model failed" in capsys.readouterr().err


def test_a_link_that_leaves_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert run(["convert", str(TINY), str(folder), "-q"]) == 0
    (tmp_path / "secret.txt").write_text("secret")
    link = folder / "notes.txt"
    link.symlink_to(folder / "model_index.json")
    gather(folder, Order())
    link.unlink()
    link.symlink_to(tmp_path / "secret.txt")

    with pytest.raises(UnsafeError, match="a link that leaves the folder"):
        gather(folder, Order())


def test_a_recipe_whose_output_is_not_there_says_what_to_do(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(merged / "recipe.yaml", tmp_path)

    assert run(["publish", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "the recipe's output is not there" in said
    assert f"fix: make it: ckptools merge {tmp_path / 'recipe.yaml'}" in said


def test_a_tag_of_another_commit_is_refused_before_anything_is_sent(
    client: Client, model: Path
) -> None:
    client.publish(model, tag="v1")
    model.with_name("LICENSE").write_text("be nice")
    client.server.log.clear()
    with pytest.raises(UsageError, match="tag 'v1'"):
        client.publish(model, tag="v1")

    assert not client.server.requests("POST", "/commit/")


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"repo": ""}, UsageError, "no repository"),
        ({"repo": "a/b/c"}, UsageError, "is no name of a repository"),
        ({"repo": "../b"}, UsageError, "is no name of a repository"),
        ({"as_pull_request": True, "tag": "v1"}, UsageError, "cannot be tagged"),
        ({"branch": "../main"}, UsageError, "no name of a branch or tag"),
        ({"tag": "v 1"}, UsageError, "no name of a branch or tag"),
        ({"as_pull_request": True}, NetworkError, "no repository alice/mixed"),
    ],
)
def test_orders_that_cannot_be_met(
    client: Client, model: Path, changed: dict[str, object], error: type[CkptError], said: str
) -> None:
    with pytest.raises(error, match=said):
        client.publish(model, **changed)


def test_a_branch_that_never_rests_ends_in_an_error(client: Client, model: Path) -> None:
    client.server.fail("POST", "/commit/", status=412, times=99)
    with pytest.raises(NetworkError, match="changes all the time"):
        client.publish(model)

    assert client.server.files(REPO) == set()


def test_the_hub_may_refuse_what_the_owner_wrote_in_the_card(client: Client, model: Path) -> None:
    client.server.put(REPO, {"README.md": b"---\nlanguage: 7\n---\n"})
    with pytest.raises(UsageError, match=r'refuses the card: .*"language"'):
        client.publish(model)


def with_parents(model: Path, *parents: Parent) -> Gathered:
    found = replace(gathered(model), order=Order(repo=REPO))
    return replace(found, facts=replace(found.facts, parents=parents))


def test_parents_on_the_hub_are_asked_for_their_licence(client: Client, model: Path) -> None:
    client.server.put("org/a", {"README.md": b"---\nlicense: mit\n---\n"}, private=False)
    one = with_parents(model, Parent("A", "a", "org/a", "", "", ""))
    two = with_parents(model, *one.facts.parents, Parent("B", "b", "org/none", "", "", ""))

    plan = make_publication(one, client.hub)
    assert plan.licence.id == "mit"
    assert "base_model:\n- org/a\nbase_model_relation: merge\n" in plan.card
    with pytest.raises(UsageError, match="the licence of B is not known"):
        make_publication(two, client.hub)
    assert "the licence of org/none cannot be read" in client.told[-1]


def test_a_licence_that_was_decided_once_stays(client: Client, model: Path) -> None:
    parents = (Parent("A", "a", "", "", "", "mit"), Parent("B", "b", "", "", "", "apache-2.0"))
    open_ = with_parents(model, *parents)
    with pytest.raises(UsageError, match="differ") as caught:
        publish(open_, client.hub)
    assert "--license" in caught.value.fix
    assert not client.server.repos
    publish(replace(open_, order=Order(repo=REPO, license="apache-2.0")), client.hub)

    assert publish(open_, client.hub).publication.is_up_to_date


# --- nothing of this machine ---------------------------------------------------------------------


def test_nothing_that_is_uploaded_names_this_machine(client: Client, model: Path) -> None:
    add_render(model)
    client.publish(model)
    words = [str(model.parent), str(Path.home()) + "/", "file:/", client.server.token]
    if len(socket.gethostname()) > 4:
        words.append(socket.gethostname())
    contents = [client.server.content(REPO, path) for path in client.server.files(REPO)]

    assert len(contents) == 9
    for word in words:
        assert not any(word.encode() in content for content in contents), word
    assert {request.token for request in client.server.log if request.storage} == {""}


def test_a_path_in_the_card_is_refused(client: Client, model: Path) -> None:
    found = gather(model, Order(repo=REPO, description="made in /home/somebody/models"))

    with pytest.raises(UnsafeError, match="a path of this machine is in the card"):
        publish(found, client.hub)
    assert not client.server.repos


def test_the_owners_name_is_no_secret_and_the_users_is(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    licence = model.with_name("LICENSE.md")
    licence.write_text("After hf://somebody/base, see https://huggingface.co/somebody/base")
    monkeypatch.setattr("getpass.getuser", lambda: "somebody")
    gather(model, Order(repo="someone/mixed"))
    licence.write_text("Copyright somebody")
    gather(model, Order(repo="somebody/mixed"))

    with pytest.raises(UnsafeError, match="the user's name of this machine is in the file"):
        gather(model, Order(repo="someone/mixed"))


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_a_path_in_a_render_is_refused(model: Path, name: str) -> None:
    folder = add_render(model)
    (folder / name).write_text(json.dumps(report_on(model) | {"note": str(model)}))
    with pytest.raises(UnsafeError, match="a path of this machine"):
        gather(model, Order())


def test_a_path_in_the_metadata_is_refused(model: Path) -> None:
    other = model.with_name("other.safetensors")
    save_file(load_file(model), other, {"note": "/home/somebody/models/A.safetensors"})
    with pytest.raises(UnsafeError, match="in the metadata"):
        gather(other, Order())


def test_a_path_in_the_header_of_a_second_shard_is_refused(merged: Path, tmp_path: Path) -> None:
    for name in "ABC":
        (tmp_path / f"{name}.safetensors").symlink_to(merged / f"{name}.safetensors")
    text = RECIPE.replace("mixed.safetensors}", "mixed.safetensors, dtype: fp32, shard_size: 1MB}")
    (tmp_path / "recipe.yaml").write_text(text)
    index = merge(load_recipe(tmp_path / "recipe.yaml")).output
    gather(index, Order())
    shard = max(tmp_path.glob("mixed-*.safetensors"))
    save_file(load_file(shard), shard, {"note": "/home/somebody/models/A.safetensors"})
    index.with_name("mixed.safetensors.ckptools.json").unlink()

    with pytest.raises(UnsafeError, match="in the metadata"):
        gather(index, Order())


# --- the plan and the command --------------------------------------------------------------------


def test_a_dry_run_sends_nothing(
    hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.put(REPO, {"mixed.safetensors": model, "recipe.yaml": b"old"})
    before = hub.repos[REPO].branches["main"]
    code = run(["publish", str(model), "--repo", REPO, "--dry-run", "--json", "--tag", "v1"])
    plan = json.loads(capsys.readouterr().out)

    assert code == 0
    assert plan["schema"] == "ckptools.publish/1"
    assert (plan["repo"], plan["visibility"], plan["revision"]) == (REPO, "private", "main")
    assert {file["path"]: file["action"] for file in plan["files"]} == {
        "mixed.safetensors": "same", "mixed.safetensors.ckptools.json": "add",
        "recipe.yaml": "update", "README.md": "add",
    }  # fmt: skip
    assert plan["files"][0]["bytes"] == model.stat().st_size
    assert plan["license"]["id"] == "creativeml-openrail-m"
    assert plan["card"].startswith("---\nlicense: creativeml-openrail-m\n")
    assert plan["tag"] == {"name": "v1", "action": "add"}
    assert hub.repos[REPO].branches["main"] == before
    assert {r.path.rpartition("/")[0] for r in hub.requests("POST")} == {
        f"/api/models/{REPO}/paths-info"  # a question that is asked by POST
    }


def test_a_dry_run_needs_no_login(
    hub: LoopbackHub,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.fail("GET", "/api/models/", status=401)  # what the Hub tells strangers
    assert run(["publish", str(model), "--repo", REPO, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    code = run(["publish", str(model), "--repo", REPO])

    assert "alice/mixed (private, new)" in shown
    assert "to send: " in shown
    assert code == 4
    assert "hf auth login" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["shown", "json"])
def test_a_dry_run_without_the_hub_shows_what_is_known_at_once(
    hub: LoopbackHub,
    model: Path,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code = run(["publish", str(model), "--repo", REPO, "--tag", "v1", "--dry-run", *words])
    said = capsys.readouterr()

    assert code == 4
    assert "trying again" not in said.err
    if not words:
        assert "alice/mixed (private if it is new; its state is not known)" in said.out
        assert "unknown" in said.out
        assert "licence: creativeml-openrail-m (all 3 parents have it)" in said.out
        assert "the Hub did not answer" in said.out
        assert "  license: creativeml-openrail-m" in said.out
        assert "error: cannot look at alice/mixed: no answer from the Hub" in said.err
        return
    plan = json.loads(said.out)
    assert plan["error"]["code"] == "network"
    assert plan["exists"] is plan["up_to_date"] is plan["upload_bytes"] is None
    assert plan["parent_commit"] is None
    assert (plan["visibility"], plan["revision"]) == ("private", "main")
    assert plan["tag"] == {"name": "v1", "action": "unknown"}
    assert {file["action"] for file in plan["files"]} == {"unknown"}
    assert plan["files"][0]["bytes"] == model.stat().st_size
    assert plan["files"][0]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert plan["license"]["id"] == "creativeml-openrail-m"
    assert plan["card"].startswith("---\nlicense: creativeml-openrail-m\n")


def test_a_dry_run_that_is_to_ask_nobody_is_no_failure(
    hub: LoopbackHub,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(["publish", str(model), "--repo", "mixed", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)

    assert "error" not in plan
    assert plan["exists"] is None
    assert any("HF_HUB_OFFLINE" in note for note in plan["notes"])
    assert run(["publish", str(model), "--repo", "a--b", "--dry-run"]) == 2
    assert hub.log == []


def test_a_dry_run_asks_a_busy_hub_once_more(client: Client, model: Path) -> None:
    hub = replace(client.hub, patient=False)
    wanted = replace(gathered(model), order=Order(repo=REPO))
    client.server.fail("GET", "/api/models/", status=503, retry_after=600)
    assert make_publication(wanted, hub, dry_run=True).problem is None
    client.server.fail("GET", "/api/models/", status=503, times=99)
    found = make_publication(wanted, hub, dry_run=True)

    assert found.problem
    assert "the Hub has trouble (503" in found.problem.what
    assert client.waits == [3.0, pytest.approx(1.5, abs=0.5)]


def test_what_cannot_be_known_of_a_licence_without_the_hub_is_open(
    client: Client, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    one = with_parents(model, Parent("A", "a", "org/a", "", "", ""))
    plan = make_publication(one, client.hub, dry_run=True)
    show_publication(plan)

    assert plan.licence.refused == "the licence of A is not known"
    assert "licences of parents on the Hub were not looked up" in plan.notes
    assert "licence: open (the licence of A is not known; A: unknown)" in capsys.readouterr().out


DRAWN = """\
ckptools: 1
models: {{A: A.safetensors, B: B.safetensors, C: C.safetensors}}
params: {{M: 0.5}}
merge: A + (B - C) * M
output: {{path: out/mixed.safetensors}}
render: {{when: {when}, steps: 4, prompts: [a red circle]}}
publish: {{repo: alice/drawn, tag: v1, tags: [art]}}
"""


@pytest.fixture
def drawn(hub: LoopbackHub, tmp_path: Path) -> Path:
    """A folder with the embedded models, to which recipes are written; a Hub is there."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    for name in "ABC":
        (folder / f"{name}.safetensors").symlink_to(TINY.with_name(f"{name}.safetensors"))
    return folder / "recipe.yaml"


def test_one_recipe_is_merged_drawn_and_published(
    hub: LoopbackHub, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn.write_text(DRAWN.format(when="before_save"))
    assert run(["merge", str(drawn), "-q", "--set", "M=0.25"]) == 0
    assert run(["publish", str(drawn)]) == 0
    said = capsys.readouterr()
    card = hub.content("alice/drawn", "README.md").decode()

    assert "recipe.yaml has another `params` than the file was merged with" in said.err
    assert "| M | default | 0.25 |" in card
    assert "Test render: **pass**" in card
    assert "](renders/merge--prompt1--seed1.png)" in card
    assert hashlib.sha256(TINY.read_bytes()).hexdigest() in card  # of A, without --hash-inputs
    assert "renders/sheet.png" in hub.files("alice/drawn")
    parents = drawn.parent / "again"
    parents.mkdir()
    for name in "ABC":
        (parents / f"{name}.safetensors").symlink_to(TINY.with_name(f"{name}.safetensors"))
    (parents / "recipe.yaml").write_bytes(hub.content("alice/drawn", "recipe.yaml"))
    again = merge(load_recipe(parents / "recipe.yaml"))  # as the card says
    assert again.output.read_bytes() == hub.content("alice/drawn", "mixed.safetensors")

    drawn.write_text(DRAWN.format(when="never"))
    assert run(["merge", str(drawn), "-q", "--force"]) == 0
    assert run(["publish", str(drawn), "--tag", "v2"]) == 0
    assert "shows other weights than these" in capsys.readouterr().err
    assert "Test render" not in hub.content("alice/drawn", "README.md").decode()


@pytest.mark.parametrize("when", ["before_save", "after_save"])
def test_a_recipe_whose_render_fails_is_not_published(
    hub: LoopbackHub, drawn: Path, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn.write_text(DRAWN.format(when=when))
    assert run(["merge", str(drawn), "-q", "--set", "M=60"]) == 1
    code = run(["publish", str(drawn)])
    said = capsys.readouterr().err

    assert hub.log == []
    if when == "before_save":
        assert code == 2
        assert "the recipe's output is not there" in said
    else:
        assert code == 1
        assert "the test render of this model failed" in said


def test_a_recipe_stands_for_its_output(
    hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(model.with_name("recipe.yaml"))
    assert run(["publish", recipe, "--tag", "v1"]) == 0
    first = capsys.readouterr().out
    assert run(["publish", recipe, "--tag", "v1"]) == 0
    second = capsys.readouterr()
    assert run(["publish", recipe, "--json"]) == 0
    third = json.loads(capsys.readouterr().out)

    assert "published alice/mixed at" in first
    assert "tag v1" in first
    assert "up to date" in second.out
    assert hub.token not in second.out + second.err + first
    assert third["up_to_date"] is True
    assert third["commit"] == hub.repos[REPO].branches["main"]
    front = yaml.safe_load(hub.content(REPO, "README.md").split(b"---")[1])
    assert front["tags"] == ["merge", "ckptools", "stable-diffusion", "test"]


def test_the_command_shows_pull_requests_and_what_is_there(
    hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.create(REPO, private=False)
    assert run(["publish", str(model), "--repo", REPO, "--pr"]) == 0
    assert f"opened {hub.url}/{REPO}/discussions/1" in capsys.readouterr().out
    assert run(["publish", str(model), "--repo", REPO, "--pr", "--dry-run"]) == 0
    assert "a pull request to branch main; on top of" in capsys.readouterr().out
    assert run(["publish", str(model), "--repo", REPO, "--public", "--tag", "v1"]) == 0
    capsys.readouterr()
    words = ["publish", str(model), "--repo", REPO, "--public", "--tag", "v1", "--dry-run"]
    assert run(words) == 0
    shown = capsys.readouterr().out

    assert "v1 (it is there)" in shown
    assert "up to date: nothing to send" in shown


def test_a_bare_name_is_the_users_own(client: Client, model: Path) -> None:
    publication = make_publication(gather(model, Order(repo="mixed")), client.hub)

    assert publication.remote.repo == REPO


def test_the_manifest_records_the_parents_licences(model: Path, merged: Path) -> None:
    manifest = json.loads((merged / "mixed.safetensors.ckptools.json").read_text())
    with safe_open(merged / "A.safetensors", "pt") as file:
        own = file.metadata()["modelspec.license"]

    assert [entry["license"] for entry in manifest["inputs"]] == [own] * 3
