"""Models on the Hub as sources: the real client against the Hub of this machine."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub_sources import hub_in
from loopback_hub import LoopbackHub
from models import layout, shrunk, write_model
from safetensors.torch import save

from ckptools.cli import run
from ckptools.errors import CkptError, InputError, NetworkError, UnsafeError, UsageError
from ckptools.hub import require_client
from ckptools.hub.remote import FIRST_READ_BYTES, Hub
from ckptools.hubref import HubRef, hub_ref_of, parse_hub_ref, shown
from ckptools.recipe import load_recipe
from ckptools.sources import open_checkpoint
from ckptools.tensors import DTYPES
from ckptools.workflow import merge

TOKEN = "hf_secretsecretsecret"
Models = tuple[Path, Path, Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with hub_in(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def pair(hub: LoopbackHub, sd1_models: Models) -> LoopbackHub:
    """alice/a and alice/b, with a model each."""
    for name, path in zip("ab", sd1_models[:2], strict=True):
        hub.put(f"alice/{name}", {"model.safetensors": path, "README.md": b"hi"}, private=False)
    return hub


def recipe_in(folder: Path, models: str, merge: str = "A + (B - C) * 0.5") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"ckptools: 1\nmodels: {models}\nmerge: {merge}\n"
                    "output: {path: out.safetensors}\n")  # fmt: skip
    return path


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def look_error(ref: str) -> CkptError:
    with pytest.raises(CkptError) as caught:
        Hub().look(Path(ref)).close()
    return caught.value


# --- names -------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("hf://o/r", HubRef("o/r")),
        ("hf://o/r@v1", HubRef("o/r", "", "v1")),
        ("hf://o/r/f.safetensors", HubRef("o/r", "f.safetensors")),
        ("hf://o/r/a/f.safetensors@" + COMMIT, HubRef("o/r", "a/f.safetensors", COMMIT)),
        ("hf://o/r@v1/f.safetensors", HubRef("o/r", "f.safetensors", "v1")),
        ("hf://o/r@refs/pr/1", HubRef("o/r", "", "refs/pr/1")),
        ("hf://o/r@refs/pr/1/f.safetensors", HubRef("o/r", "f.safetensors", "refs/pr/1")),
    ],
)
def test_references_are_read_and_travel_as_paths(text: str, ref: HubRef) -> None:
    assert parse_hub_ref(text) == ref
    assert hub_ref_of(Path(text)) == ref
    assert parse_hub_ref(str(ref)) == ref
    assert shown(Path(text)) == text


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://o", "hf://o/", "hf://o/..", "hf://../r", "hf://o/r/../x", "hf://o/r//x",
     "hf://o/r/a\x1b.safetensors", "hf://o/r/a\\b", "hf://spaces/o/r", "hf://o/r@", "hf://o/r@../x",
     "hf://o/r/f@a b"],
)  # fmt: skip
def test_names_that_leave_the_repository_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_hub_ref(text)

    assert caught.value.fix


def test_paths_of_this_machine_stay_paths(tmp_path: Path) -> None:
    assert hub_ref_of(tmp_path) is None
    assert shown(tmp_path) == str(tmp_path)
    with pytest.raises(InputError, match="a model on the Hub") as caught:
        open_checkpoint(Path("hf://o/r"))
    assert caught.value.fix == "run `hf download o/r` and give its path"


# --- headers over ranges -----------------------------------------------------------------------


def test_inspect_reads_the_header_alone_and_says_what_it_says_of_the_file(
    pair: LoopbackHub, sd1_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "hf://alice/a", "--json"]) == 0
    found = answer(capsys)
    assert run(["inspect", str(sd1_models[0]), "--json"]) == 0
    local = answer(capsys)

    for key in ("family", "variant", "kind", "layout", "components", "metadata"):
        assert found[key] == local[key]
    assert found["file"] == "hf://alice/a"
    ranges = [request.headers.get("Range") for request in pair.requests("GET", "/resolve/")]
    assert ranges == [f"bytes=0-{FIRST_READ_BYTES - 1}"]
    assert len(pair.log) == 3  # what is there, where it lies, the part


@pytest.mark.parametrize("revision", ["", "@main", "@v1", "@commit"])
def test_a_full_size_sdxl_file_takes_two_requests_and_half_a_megabyte(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], revision: str
) -> None:
    specs = sorted(layout("sdxl").values(), key=lambda spec: (-DTYPES[spec.dtype].bits, spec.name))
    entries, at = {}, 0
    for spec in specs:
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape,
                              "data_offsets": [at, at + spec.nbytes]}  # fmt: skip
        at += spec.nbytes
    raw = json.dumps(entries).encode()
    path = tmp_path / "sdxl.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with path.open("r+b") as stream:
        stream.truncate(8 + len(raw) + at)  # sparse: a few hundred kB on the disk
    commit = hub.put_sparse("alice/xl", "sdxl.safetensors", path).oid
    hub.repos["alice/xl"].tags["v1"] = commit
    revision = revision.replace("commit", commit)

    assert run(["inspect", f"hf://alice/xl/sdxl.safetensors{revision}", "--json"]) == 0

    found = answer(capsys)
    assert at > 6_900_000_000
    assert found["family"] == "sdxl"
    assert found["whole"] is True
    assert len(hub.log) == 2  # where it lies, the part
    (part,) = hub.requests("GET", "/cdn/")
    assert part.headers["Range"] == f"bytes=0-{FIRST_READ_BYTES - 1}"
    assert FIRST_READ_BYTES < 1_000_000
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_what_one_request_told_of_a_file_holds_for_the_session(
    pair: LoopbackHub, sd1_models: Models
) -> None:
    file = Path("hf://alice/a/model.safetensors")
    hub = Hub()
    hub.look(file).close()
    first = pair.repos["alice/a"].branches["main"]
    pair.put("alice/a", {"model.safetensors": sd1_models[2], "b.safetensors": sd1_models[1]})

    with hub.look(file) as again, open_checkpoint(sd1_models[0]) as local:
        assert again.header_sha256 == local.header_sha256
    assert len(pair.log) == 2
    with pytest.raises(InputError, match=r"no file 'b\.safetensors'"):
        hub.look(Path("hf://alice/a/b.safetensors"))  # of the commit that came later
    with hub.open_whole(file) as whole, open_checkpoint(sd1_models[0]) as local:
        name = next(iter(local))
        assert whole.read(name) == local.read(name)
    assert hub.find(HubRef("alice/a", "model.safetensors")).ref.revision == first


def test_a_file_that_the_hub_keeps_itself_takes_one_request(
    hub: LoopbackHub, sd1_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "is_large", lambda *_: False)
    hub.put("alice/a", {"m.safetensors": sd1_models[0]}, private=False)

    with Hub().look(Path("hf://alice/a/m.safetensors")) as found:
        with open_checkpoint(sd1_models[0]) as local:
            assert found.header_sha256 == local.header_sha256
        assert found.file_bytes == sd1_models[0].stat().st_size
    assert len(hub.log) == 1
    hub.fail("GET", "/resolve/", ignore_range=True, times=2)
    assert "ignores ranges" in look_error("hf://alice/a/m.safetensors").what


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-Size"])
def test_a_mirror_that_says_little_of_a_file_is_asked_for_all_files(
    pair: LoopbackHub, header: str
) -> None:
    pair.fail("GET", "/resolve/", without=(header,), times=2)

    Hub().look(Path("hf://alice/a/model.safetensors")).close()

    assert len(pair.requests("GET", "/api/models/")) == 1
    assert len(pair.requests("GET", "/cdn/")) == 1


def test_a_repository_that_was_renamed_is_found_under_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd1_models: Models
) -> None:
    with hub_in(tmp_path, monkeypatch, token=TOKEN) as hub:
        hub.token = TOKEN
        hub.put("alice/new", {"m.safetensors": sd1_models[0]})
        hub.renamed["alice/old"] = "alice/new"
        Hub().look(Path("hf://alice/old/m.safetensors")).close()

        assert [request.token for request in hub.log] == [TOKEN, TOKEN, ""]
        hub.renamed["alice/round"] = "alice/round"
        assert "redirects again and again" in look_error("hf://alice/round/m.safetensors").what


def test_a_long_header_takes_one_more_part(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd1_models: Models
) -> None:
    monkeypatch.setattr("ckptools.hub.remote.FIRST_READ_BYTES", 1000)
    hub.put("alice/a", {"model.safetensors": sd1_models[0]}, private=False)

    with Hub().look(Path("hf://alice/a")) as remote, open_checkpoint(sd1_models[0]) as local:
        assert dict(remote) == dict(local)
        assert remote.header_sha256 == local.header_sha256
        name = max(local, key=lambda n: local.files[0].header.starts[n])
        assert not remote.has_values(name)
        with pytest.raises(InputError, match="only the header was read"):
            remote.read(name)
        remote.check_unchanged()
    assert len(hub.requests("GET", "/cdn/")) == 2
    assert len(hub.requests("GET", "/resolve/")) == 1


def test_values_within_the_first_part_are_read(hub: LoopbackHub, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.safetensors", dict([*shrunk("sd1").items()][:3]), seed=1)
    hub.put("alice/a", {"m.safetensors": path}, private=False)

    with Hub().look(Path("hf://alice/a")) as remote, open_checkpoint(path) as local:
        for name in local:
            assert remote.has_values(name)
            assert remote.read(name) == local.read(name)


def test_structures_are_compared_by_headers(
    pair: LoopbackHub, sd1_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["diff", "hf://alice/a", str(sd1_models[1]), "--structure", "--json"]) == 0

    assert answer(capsys)["same"] is True
    assert len(pair.requests("GET", "/cdn/")) == 1


def test_values_are_compared_after_a_download(
    pair: LoopbackHub, sd1_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["diff", "hf://alice/a", str(sd1_models[0]), "--json", "--exit-code"]) == 0
    assert run(["diff", "hf://alice/a", str(sd1_models[1]), "-q"]) == 1


def test_a_server_that_ignores_ranges_is_refused(pair: LoopbackHub) -> None:
    pair.fail("GET", "/cdn/", ignore_range=True)

    error = look_error("hf://alice/a")

    assert isinstance(error, NetworkError)
    assert "ignores ranges" in error.what


def test_a_part_that_is_cut_short_is_refused(pair: LoopbackHub) -> None:
    pair.fail("GET", "/cdn/", cut_after=100)

    assert isinstance(look_error("hf://alice/a"), NetworkError)


@pytest.mark.parametrize("length", [0, 2**62, 26_000_000, 300])
def test_a_header_of_a_length_that_cannot_be_is_refused(hub: LoopbackHub, length: int) -> None:
    data = struct.pack("<Q", length) + b"{}" + bytes(400)
    size = 30_000_000 if length == 26_000_000 else len(data)
    hub.put("alice/a", {"m.safetensors": data.ljust(size, b"\0")}, private=False)

    error = look_error("hf://alice/a")

    assert isinstance(error, InputError)
    assert error.where.startswith("hf://alice/a/m.safetensors@")
    assert len(hub.requests("GET", "/cdn/")) == 1


def test_a_file_that_is_not_the_listed_one_is_refused(hub: LoopbackHub, sd1_models: Models) -> None:
    commit = hub.put("alice/a", {"model.safetensors": sd1_models[0]}, private=False)

    def change() -> None:
        other = hub.stored(sd1_models[1].read_bytes())
        repo = hub.repos["alice/a"]
        files = dict(commit.files) | {"model.safetensors": other}
        repo.commits[commit.oid] = type(commit)(commit.oid, commit.parent, "", "", files)

    hub.fail("GET", "/resolve/", before=change)

    error = look_error("hf://alice/a")

    assert isinstance(error, NetworkError)
    assert "the revision moved while it was read: its sha256 was" in error.what


def test_a_file_that_changes_between_two_parts_is_refused(
    pair: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptools.hub.remote.FIRST_READ_BYTES", 1000)
    pair.fail("GET", "/cdn/", skip=1, without=("ETag",))

    error = look_error("hf://alice/a/model.safetensors")

    assert error.what == "the revision moved while it was read: its ETag changed"


def test_a_file_that_is_listed_as_another_before_its_download_is_refused(
    pair: LoopbackHub, sd1_models: Models
) -> None:
    hub, file = Hub(), Path("hf://alice/a/model.safetensors")
    hub.look(file).close()
    repo = pair.repos["alice/a"]
    commit = repo.commits[repo.branches["main"]]
    other = dict(commit.files) | {"model.safetensors": pair.stored(sd1_models[1].read_bytes())}
    repo.commits[commit.oid] = replace(commit, files=other)

    with pytest.raises(NetworkError, match="moved while it was read: its sha256 was"):
        hub.open_whole(file)


def renamed(hub: LoopbackHub, oid: str, name: str = "alice/a") -> Callable[[], None]:
    """Lets a hub answer requests for main's commit with one that is called `oid`."""

    def change() -> None:
        repo = hub.repos[name]
        commit = repo.commits[repo.branches["main"]]
        repo.commits[repo.branches["main"]] = replace(commit, oid=oid)

    return change


def test_a_hub_that_answers_for_another_commit_is_refused(pair: LoopbackHub) -> None:
    commit = pair.repos["alice/a"].branches["main"]
    pair.fail("GET", "/resolve/", before=renamed(pair, "f" * 40))
    assert "moved while it was read: the Hub answers for commit ffff" in (
        look_error("hf://alice/a").what
    )
    with pytest.raises(NetworkError, match="moved while it was read"):
        Hub().look(Path(f"hf://alice/a@{commit}"))
    renamed(pair, commit)()

    pair.fail("HEAD", "/resolve/", before=renamed(pair, "e" * 40))
    with pytest.raises(NetworkError, match="moved while it was read: the Hub answers for commit e"):
        Hub().fetch(HubRef("alice/a"))

    renamed(pair, "no commit")()
    assert look_error("hf://alice/a").what == "the server names no commit"


def test_a_branch_that_moves_within_a_session_stays_what_it_was(
    pair: LoopbackHub, sd1_models: Models
) -> None:
    hub = Hub()
    first = hub.find(HubRef("alice/a")).ref.revision
    pair.put("alice/a", {"model.safetensors": sd1_models[2]}, private=False)

    with hub.open_whole(Path("hf://alice/a")) as found, open_checkpoint(sd1_models[0]) as expected:
        name = next(iter(expected))
        assert found.read(name) == expected.read(name)
    assert hub.find(HubRef("alice/a")).ref.revision == first
    assert Hub().find(HubRef("alice/a")).ref.revision != first


def test_a_part_of_a_file_of_another_size_is_refused(pair: LoopbackHub, sd1_models: Models) -> None:
    sha256 = hashlib.sha256(sd1_models[0].read_bytes()).hexdigest()
    pair.object_path(sha256).write_bytes(sd1_models[0].read_bytes() + b"more")

    error = look_error("hf://alice/a")

    assert isinstance(error, NetworkError)
    assert "the server sent 'bytes 0-524287/" in error.what
    assert "were asked for" in error.what


def test_a_file_that_is_listed_and_not_there_is_refused(pair: LoopbackHub) -> None:
    def remove() -> None:
        repo = pair.repos["alice/a"]
        commit = repo.commits[repo.branches["main"]]
        repo.commits[commit.oid] = replace(commit, files={})

    pair.fail("GET", "/resolve/", before=remove)

    assert look_error("hf://alice/a").what == "the Hub has no such file"


# --- which file --------------------------------------------------------------------------------


def test_several_files_are_listed_and_one_is_to_be_named(
    hub: LoopbackHub, sd1_models: Models
) -> None:
    hub.put("alice/a", {"x.safetensors": sd1_models[0], "y.safetensors": sd1_models[1]},
            private=False)  # fmt: skip

    error = look_error("hf://alice/a")

    assert error.exit_code == 2
    assert error.what == "2 files of weights in this repository"
    assert error.fix == "give one of its files: x.safetensors, y.safetensors"
    Hub().look(Path("hf://alice/a/y.safetensors")).close()


@pytest.mark.parametrize(
    ("ref", "what", "fix"),
    [
        ("hf://alice/a/model2.safetensors", "no file 'model2.safetensors'", "'model.safetensors'"),
        ("hf://alice/a/README.md", "'README.md' is not a file of weights", "model.safetensors"),
        ("hf://alice/a@v9", "no revision 'v9'", "a branch, a tag or a commit"),
        ("hf://alice/a/zz", "no file 'zz'", "give one of its files: model.safetensors"),
        ("hf://alice/text", "no .safetensors file", "give a repository with"),
        ("hf://alice/pickle", "no .safetensors file", "give one of its files: m.ckpt"),
        ("hf://alice/pickle/m.ckpt", "a pickle has no header", "hf download alice/pickle m.ckpt"),
    ],
)
def test_what_is_not_there_is_a_mistake(pair: LoopbackHub, ref: str, what: str, fix: str) -> None:
    pair.put("alice/text", {"README.md": b"x"}, private=False)
    pair.put("alice/pickle", {"m.ckpt": b"PK"}, private=False)

    error = look_error(ref)

    assert error.exit_code == 2
    assert what in error.what
    assert fix in error.fix


def shards(specs_from: Path, *, names: tuple[str, str]) -> dict[str, bytes]:
    """A model in two shards, with its index."""
    from safetensors.torch import load_file

    tensors = load_file(specs_from)
    keys = sorted(tensors)
    halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    weight_map = {key: name for half, name in zip(halves, names, strict=True) for key in half}
    files = {
        name: save({key: tensors[key] for key in half})
        for half, name in zip(halves, names, strict=True)
    }
    return files | {"m.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


NAMES = ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")


def test_shards_are_read_by_their_index(hub: LoopbackHub, sd1_models: Models) -> None:
    hub.put("alice/s", shards(sd1_models[0], names=NAMES), private=False)

    with Hub().look(Path("hf://alice/s")) as remote, open_checkpoint(sd1_models[0]) as local:
        assert dict(remote) == dict(local)
    assert len(hub.requests("GET", "/cdn/")) == 2

    with Hub().open_whole(Path("hf://alice/s")) as whole, open_checkpoint(sd1_models[0]) as local:
        for name in local:
            assert whole.read(name) == local.read(name)


def test_an_index_that_leaves_its_repository_is_refused_before_any_request(
    hub: LoopbackHub, sd1_models: Models
) -> None:
    files = shards(sd1_models[0], names=NAMES)
    index = json.loads(files["m.safetensors.index.json"])
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../../../bob/secret/resolve/main/x.safetensors"
    files["m.safetensors.index.json"] = json.dumps(index).encode()
    hub.put("alice/s", files, private=False)

    for attempt in (Hub().look, Hub().open_whole):
        with pytest.raises(UnsafeError, match="points outside its folder"):
            attempt(Path("hf://alice/s"))
    assert hub.requests("GET", "/cdn/") == []
    assert hub.requests("GET", "bob") == []


def test_an_index_that_is_no_text_by_its_size_is_not_fetched(
    hub: LoopbackHub, sd1_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptools.hub.remote.MAX_HEADER_BYTES", 10_000)
    hub.put("alice/s", shards(sd1_models[0], names=NAMES), private=False)

    for attempt in (Hub().look, Hub().open_whole):
        with pytest.raises(InputError, match="10,000 are read at most of such a file"):
            attempt(Path("hf://alice/s"))
    assert hub.requests("GET", "/resolve/") == []


def test_an_index_of_shards_that_are_not_there_is_refused(
    hub: LoopbackHub, sd1_models: Models
) -> None:
    files = shards(sd1_models[0], names=NAMES)
    del files[NAMES[1]]
    hub.put("alice/s", files, private=False)

    assert f"no file '{NAMES[1]}' in this revision" in look_error("hf://alice/s").what


# --- access ------------------------------------------------------------------------------------


def test_a_token_goes_to_the_hub_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd1_models: Models,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with hub_in(tmp_path, monkeypatch, token=TOKEN) as hub:
        hub.token = TOKEN
        hub.put("alice/a", {"model.safetensors": sd1_models[0]}, private=True)
        assert run(["inspect", "hf://alice/a"]) == 0
        assert run(["inspect", "hf://alice/other"]) == 4

        assert {request.token for request in hub.log if not request.storage} == {TOKEN}
        assert {request.token for request in hub.log if request.storage} == {""}
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err


@pytest.mark.parametrize(
    ("status", "what", "fix"),
    [
        (401, "does not let you in (401)", "hf auth login"),
        (403, "does not let you in (403)", "hf auth login"),
        (429, "too many requests", "wait some minutes"),
        (500, "answered with an error (500)", "later"),
    ],
)
def test_what_the_hub_refuses_is_exit_code_4(
    pair: LoopbackHub, status: int, what: str, fix: str
) -> None:
    pair.fail("GET", "/api/models/", status=status)

    error = look_error("hf://alice/a")

    assert isinstance(error, NetworkError)
    assert error.exit_code == 4
    assert what in error.what
    assert fix in error.fix


def test_errors_of_a_part_are_told_too(pair: LoopbackHub) -> None:
    pair.fail("GET", "/cdn/", status=503)
    assert "answered with an error (503)" in look_error("hf://alice/a").what

    pair.fail("GET", "/cdn/", status=403)  # as for a signed address that is too old
    assert "storage does not give the file out (403)" in look_error("hf://alice/a").what


def test_gated_and_missing_repositories(hub: LoopbackHub, sd1_models: Models) -> None:
    hub.put("alice/a", {"model.safetensors": sd1_models[0]}, private=False)
    hub.repos["alice/a"].gated = True

    for file in ("", "/model.safetensors"):
        gated, missing = look_error(f"hf://alice/a{file}"), look_error(f"hf://alice/none{file}")

        assert gated.exit_code == missing.exit_code == 4
        assert "gated" in gated.what
        assert "hf auth login" in gated.fix
        assert "hf auth login" in missing.fix


def test_a_network_that_is_down(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    error = look_error("hf://alice/a")

    assert error.exit_code == 4
    assert "cannot be reached" in error.what
    monkeypatch.setenv("HF_ENDPOINT", "http://user:secret@127.0.0.1:9")
    assert "the Hub at http://127.0.0.1:9 cannot" in look_error("hf://alice/a").what
    assert "HF_HUB_OFFLINE=1" in error.fix


# --- recipes -----------------------------------------------------------------------------------


def test_a_plan_reads_headers_alone(
    pair: LoopbackHub, sd1_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = f"{{A: hf://alice/a, B: hf://alice/b@main, C: {sd1_models[2]}}}"
    path = recipe_in(tmp_path, models)
    assert run(["plan", str(path), "--json"]) == 0
    found = answer(capsys)
    assert run(["explain", str(path), "*time_embed.0.weight"]) == 0
    capsys.readouterr()
    local = f"{{A: {sd1_models[0]}, B: {sd1_models[1]}, C: {sd1_models[2]}}}"
    assert run(["plan", str(recipe_in(tmp_path, local)), "--json"]) == 0

    expected = answer(capsys)
    for key in ("tensors", "read_bytes", "output_bytes", "peak_bytes", "family", "components"):
        assert found[key] == expected[key]
    assert len(pair.requests("GET", "/cdn/")) == 4
    assert all(request.headers["Range"] for request in pair.requests("GET", "/cdn/"))
    assert not (tmp_path / "cache").exists()


def test_a_plan_asks_two_things_of_every_file_that_is_named(
    pair: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = "{A: hf://alice/a/model.safetensors, B: hf://alice/b/model.safetensors@main}"
    path = recipe_in(tmp_path, models, "A * 0.5 + B * 0.5")

    assert run(["plan", str(path), "--json"]) == 0

    assert answer(capsys)["family"] == "sd1"
    assert len(pair.log) == 4
    assert not (tmp_path / "cache").exists()


def test_a_merge_fetches_its_models_and_gives_the_bytes_of_local_ones(
    pair: LoopbackHub, sd1_models: Models, tmp_path: Path
) -> None:
    models = f"{{A: hf://alice/a, B: hf://alice/b/model.safetensors, C: {sd1_models[2]}}}"
    remote = merge(load_recipe(recipe_in(tmp_path, models)))
    downloads = len(pair.requests("GET", "/cdn/"))
    manifest = json.loads(remote.manifest.read_text())
    again = merge(load_recipe(recipe_in(tmp_path, models)), force=True)
    local = f"{{A: {sd1_models[0]}, B: {sd1_models[1]}, C: {sd1_models[2]}}}"
    expected = merge(load_recipe(recipe_in(tmp_path, local)), force=True)

    assert remote.sha256_data == again.sha256_data == expected.sha256_data
    commit = pair.repos["alice/a"].branches["main"]
    sha256 = hashlib.sha256(sd1_models[0].read_bytes()).hexdigest()
    written = manifest["recipe"]["models"]["A"]
    assert written == {"path": f"hf://alice/a/model.safetensors@{commit}", "sha256": sha256}
    assert manifest["inputs"][0]["file"] == "model.safetensors"
    assert str(tmp_path) not in remote.manifest.read_text()
    assert downloads == 4  # two headers, two files
    assert len(pair.requests("GET", "/cdn/")) == 6  # the headers again; the files are in the cache


def test_mistakes_are_found_before_anything_is_downloaded(
    pair: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_in(tmp_path, "{A: hf://alice/a, B: hf://alice/b, C: missing.safetensors}")

    assert run(["merge", str(path), "-q"]) == 2

    assert "model 'C': no such file" in capsys.readouterr().err
    assert all(request.headers["Range"] for request in pair.requests("GET", "/cdn/"))


def test_every_repository_that_fails_is_named(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_in(tmp_path, "{A: hf://alice/x, B: hf://alice/y, C: hf://alice/z}")

    assert run(["plan", str(path), "--json"]) == 4

    error = answer(capsys)["error"]
    assert isinstance(error, dict)
    assert error["code"] == "network"
    assert "model 'A'" in error["message"]
    assert [one["message"][:9] for one in error["others"]] == ["model 'B'", "model 'C'"]
    assert "recipe.yaml:2" in error["where"]


def test_a_pin_that_is_not_the_hubs_is_refused_before_the_download(
    pair: LoopbackHub, tmp_path: Path
) -> None:
    models = f"{{A: {{path: hf://alice/a, revision: main, sha256: {'0' * 64}}}}}"

    with pytest.raises(InputError, match="is not the pinned file"):
        merge(load_recipe(recipe_in(tmp_path, models, "A")))
    assert pair.requests("GET", "/cdn/") == []


def test_an_adapter_is_fetched_for_a_plan_for_its_scales_are_values(
    pair: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Path(__file__).parents[1] / "ckptools" / "tiny"
    lora = next(p for p in sorted(tiny.glob("*.safetensors")) if p.stem == "glow")
    pair.put("alice/l", {"glow.safetensors": lora}, private=False)
    path = recipe_in(tmp_path, f"{{A: {tiny / 'A.safetensors'}}}", "A")
    path.write_text(path.read_text() + "loras: [hf://alice/l]\n")

    assert run(["plan", str(path), "--json"]) == 0
    assert answer(capsys)["adapters"]
    assert run(["inspect", "hf://alice/l", "--json"]) == 0
    assert answer(capsys)["kind"] == "lora"


def test_verify_computes_a_merge_of_the_hubs_models_again(
    pair: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_in(tmp_path, "{A: hf://alice/a, B: hf://alice/b}", "A * 0.5 + B * 0.5")
    assert run(["merge", str(path), "-q"]) == 0

    code = run(["verify", str(tmp_path / "out.safetensors"), "--recipe", str(path), "--json"])

    assert code == 0, capsys.readouterr().out


def test_the_config_of_a_peft_adapter_comes_with_it(
    hub: LoopbackHub, sd1_models: Models, tmp_path: Path
) -> None:
    files: dict[str, Path | bytes] = {
        "l/adapter_model.safetensors": sd1_models[0],
        "l/adapter_config.json": b'{"lora_alpha": 4}',
        "l/more.json": b"{}",
    }
    hub.put("alice/l", files, private=False)

    path = Hub().fetch(HubRef("alice/l"))

    assert sorted(item.name for item in path.parent.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_pickle_is_fetched_for_a_plan_for_it_has_no_header(
    hub: LoopbackHub, tmp_path: Path, sd1_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(sd1_models[0]), tmp_path / "m.ckpt")
    hub.put("alice/p", {"m.ckpt": tmp_path / "m.ckpt"}, private=False)

    assert run(["plan", str(recipe_in(tmp_path, "{A: hf://alice/p/m.ckpt}", "A")), "--json"]) == 0
    assert answer(capsys)["family"] == "sd1"


# --- downloads ---------------------------------------------------------------------------------


def test_a_file_that_is_not_the_hubs_is_refused_and_put_out_of_the_cache(
    pair: LoopbackHub, sd1_models: Models, tmp_path: Path
) -> None:
    sha256 = hashlib.sha256(sd1_models[0].read_bytes()).hexdigest()
    data = bytearray(sd1_models[0].read_bytes())
    data[-1] ^= 1
    pair.object_path(sha256).write_bytes(data)

    for _ in range(2):
        with pytest.raises(NetworkError, match="is not the Hub's: its sha256 is") as caught:
            Hub().fetch(HubRef("alice/a"))
        assert "run it again" in caught.value.fix
    pair.object_path(sha256).write_bytes(sd1_models[0].read_bytes())
    assert Hub().fetch(HubRef("alice/a")).read_bytes() == sd1_models[0].read_bytes()


def test_a_file_of_another_size_in_the_cache_is_put_out_of_it(pair: LoopbackHub) -> None:
    path = Hub().fetch(HubRef("alice/a"))
    with path.open("ab") as stream:
        stream.write(b"x")

    with pytest.raises(NetworkError, match="is not the Hub's: it has"):
        Hub().fetch(HubRef("alice/a"))
    assert not path.exists()


def test_what_is_in_the_cache_is_used_without_a_network(
    pair: LoopbackHub, sd1_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    Hub().fetch(HubRef("alice/a"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pair.log.clear()

    for path in (Path("hf://alice/a"), Path("hf://alice/a@main")):
        with Hub().look(path) as found, open_checkpoint(sd1_models[0]) as local:
            assert dict(found) == dict(local)
    assert merge(load_recipe(recipe_in(tmp_path, "{A: hf://alice/a}", "A"))).output.exists()
    error = look_error("hf://alice/b")
    assert error.exit_code == 4
    assert "HF_HUB_OFFLINE" in error.what
    assert pair.log == []


def test_progress_counts_every_byte_once(pair: LoopbackHub, sd1_models: Models) -> None:
    class Counting:
        total = done = 0

        def start(self, stage: str, total_bytes: int) -> None:
            assert stage == "downloading"
            self.total += total_bytes

        def advance(self, nbytes: int) -> None:
            self.done += nbytes

    counting = Counting()
    Hub(counting).fetch(HubRef("alice/a"))

    assert counting.done == counting.total == sd1_models[0].stat().st_size


def test_a_diffusers_folder_is_read_by_headers_and_fetched_without_the_rest(
    hub: LoopbackHub, tmp_path: Path, sd1_models: Models
) -> None:
    folder = tmp_path / "folder"
    assert run(["convert", str(sd1_models[0]), str(folder), "-q"]) == 0
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    more = {"x.safetensors": sd1_models[1], "safety_checker/model.safetensors": sd1_models[1]}
    hub.put("alice/d", files | more, private=False)

    with Hub().look(Path("hf://alice/d")) as remote, open_checkpoint(folder) as local:
        assert dict(remote) == dict(local)
        assert remote.layout == "diffusers"
        weights = len(hub.requests("GET", "/cdn/"))
        assert weights == len(local.files)
    with Hub().open_whole(Path("hf://alice/d")) as whole, open_checkpoint(folder) as local:
        for name in local:
            assert whole.read(name) == local.read(name)
    assert not list((tmp_path / "cache").rglob("x.safetensors"))
    assert not list((tmp_path / "cache").rglob("safety_checker"))


def test_local_work_does_not_load_the_client(sd1_models: Models, tmp_path: Path) -> None:
    import subprocess
    import sys

    path = recipe_in(tmp_path, f"{{A: {sd1_models[0]}}}", "A")
    code = (
        "import sys; from ckptools.cli import run; "
        f"code = run(['merge', {str(path)!r}, '-q']); "
        "print(code, 'huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["0", "False"]


def test_an_old_client_is_named_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.36.2")

    with pytest.raises(UsageError, match=r"huggingface_hub 1\.0 or later; 0\.36\.2 is installed"):
        require_client()
