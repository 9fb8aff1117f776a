"""Pickles made to harm: none may run anything, hang, or be read; each is refused by its reason.

Where it can be done at no risk, the same bytes are first given to Python's own unpickler, which
does run them: that shows that the test could fail.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import json
import pickle
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptools import pickles
from ckptools.cli import run
from ckptools.errors import InvalidFileError, UnsafeError
from ckptools.sources import open_checkpoint

Captured = pytest.CaptureFixture[str]


# --- an assembler --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """A global, written with the GLOBAL operation."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """A REDUCE of a function on arguments."""

    function: object
    args: tuple[object, ...]


@dataclass(frozen=True)
class Stored:
    """A persistent id."""

    id: object


def code(value: object) -> bytes:
    """Operations that push a value; bytes are operations already."""
    match value:
        case bytes():
            return value
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(code(k) + code(v) for k, v in value.items()) + b"u"
        case Name():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return code(value.function) + code(value.args) + b"R"
        case Stored():
            return code(value.id) + b"Q"
    raise AssertionError(value)


def program(value: object, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + code(value) + b"."


def storage(key: object = "0", numel: object = 4, kind: str = "FloatStorage") -> Stored:
    return Stored(("storage", Name("torch", kind), key, "cpu", numel))


def tensor(
    offset: object = 0, size: object = (2, 2), stride: object = (2, 1), of: object = None
) -> Call:
    hooks = Call(Name("collections", "OrderedDict"), ())
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"),
        (of or storage(), offset, size, stride, False, hooks),
    )


def archive(
    pickled: bytes, extra: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED
) -> bytes:
    """As `torch.save` packs a pickle with one storage of 16 bytes."""
    members = {"m/data.pkl": pickled, "m/byteorder": b"little", "m/data/0": bytes(16)}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as packed:
        for name, data in (members | {"m/version": b"3\n"} | (extra or {})).items():
            packed.writestr(name, data)
    return stream.getvalue()


def legacy(pickled: bytes, keys: object = (), tail: bytes = b"") -> bytes:
    """As the format before zip has it."""
    system = {"protocol_version": 1001, "little_endian": True}
    head = [program(0x1950A86A20F9469CFC6C), program(1001), program(system)]
    return (
        b"".join(head) + pickled + program(list(keys) if isinstance(keys, tuple) else keys) + tail
    )


GOOD = program({"a": tensor()})


def refused(
    folder: Path, content: bytes, captured: Captured, name: str = "m.ckpt"
) -> tuple[int, str]:
    """Exit code and message of `plan --json` of a merge that has the file as a model."""
    (folder / name).write_bytes(content)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {name}}}\nmerge: A\noutput: {{path: o.safetensors}}\n"
    )
    status = run(["plan", str(recipe), "--json"])
    error = json.loads(captured.readouterr().out)["error"]
    return status, f"{error['message']} [{error['fix']}]"


@pytest.mark.parametrize("content", [archive(GOOD), legacy(GOOD, ("0",), b"\4" + bytes(23))])
def test_the_assembler_writes_files_that_are_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.ckpt"
    path.write_bytes(content)

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.read("a") == bytes(16)


# --- code ----------------------------------------------------------------------------------------


def call(module: str, name: str, *args: object) -> Callable[[str], object]:
    """A call on arguments in which "CANARY" stands for the path."""

    def filled(value: object, canary: str) -> object:
        if isinstance(value, str):
            return value.replace("CANARY", canary)
        if isinstance(value, Call):
            return Call(filled(value.function, canary), filled(value.args, canary))  # type: ignore[arg-type]
        if isinstance(value, tuple | list):
            return type(value)(filled(item, canary) for item in value)
        return value

    return lambda canary: filled(Call(Name(module, name), args), canary)


TOUCH = "open('CANARY', 'w').close()"
IMPORTED = Call(Name("builtins", "__import__"), ("os",))
# What the bytes do when Python unpickles them; all of these leave the canary's file behind.
ARMED: dict[str, Callable[[str], object]] = {
    "os.system": call("os", "system", "touch CANARY"),
    "posix.system": call("posix", "system", "touch CANARY"),
    "builtins.eval": call("builtins", "eval", TOUCH),
    "builtins.exec": call("builtins", "exec", TOUCH),
    "__builtin__.exec": call("__builtin__", "exec", TOUCH),
    "builtins.open": call("builtins", "open", "CANARY", "w"),
    "builtins.getattr": lambda canary: Call(
        Call(Name("builtins", "getattr"), (IMPORTED, "system")), (f"touch {canary}",)),
    "subprocess.getoutput": call("subprocess", "getoutput", "touch CANARY"),
    "timeit.timeit": call("timeit", "timeit", TOUCH, "pass", Name("time", "time"), 1),
    "cProfile.run": call("cProfile", "run", TOUCH, "CANARY.stats"),
    "runpy._run_code": call("runpy", "_run_code", TOUCH, {}),
    "functools.partial": lambda canary: Call(
        Call(Name("functools", "partial"), (Name("builtins", "open"), canary, "w")), ()),
    "operator.methodcaller": lambda canary: Call(
        Call(Name("operator", "methodcaller"), ("system", f"touch {canary}")), (IMPORTED,)),
    "numpy.testing._private.utils.runstring":
        call("numpy.testing._private.utils", "runstring", TOUCH, {}),
    "os.path.os.system": lambda canary: (
        code("os") + code("path.os.system") + b"\x93" + code((f"touch {canary}",)) + b"R"),
    "torch.serialization.os.system": lambda canary: (
        code("torch") + code("serialization.os.system") + b"\x93"
        + code((f"touch {canary}",)) + b"R"),
    "os.system, from the memo": lambda canary: (
        code("system") + b"q\x010" + code("os") + b"q\x020h\x02h\x01\x93q\x030h\x03"
        + code((f"touch {canary}",)) + b"R"),
    "os.system, INST": lambda canary: b"(" + code(f"touch {canary}") + b"ios\nsystem\n",
    "os.system, OBJ": lambda canary: (
        b"(" + code(Name("os", "system")) + code(f"touch {canary}") + b"o"),
    "os.system, protocol 0": lambda canary: (
        b"cos\nsystem\np0\n(S'touch " + canary.encode() + b"'\np1\ntp2\nRp3\n"),
    "os.system, discarded": lambda canary: (
        code(Call(Name("os", "system"), (f"touch {canary}",))) + b"0" + code({})),
    "os.system, as __setstate__": lambda canary: (
        code(Name("argparse", "Namespace")) + b")\x81}" + code("__setstate__")
        + code(Name("os", "system")) + b"sb" + code(f"touch {canary}") + b"b"),
    "builtins.exec, in a key": lambda canary: {
        Call(Name("builtins", "exec"), (TOUCH.replace("CANARY", canary),)): 1},
}  # fmt: skip


def armed(name: str, canary: Path) -> bytes:
    value = ARMED[name](str(canary))
    body = (
        code(value)
        if not isinstance(value, dict)
        else (b"}" + b"".join(code(key) + code(item) + b"s" for key, item in value.items()))
    )
    return program(body, 2 if "__builtin__" in name or "protocol 0" in name else 4)


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "zip": archive, "legacy": legacy, "raw": lambda raw: raw,
}  # fmt: skip


@pytest.mark.parametrize("name", ARMED)
def test_code_is_not_run_and_named(tmp_path: Path, capsys: Captured, name: str) -> None:
    canary = tmp_path / "canary"
    raw = armed(name, canary)
    with contextlib.suppress(pickle.UnpicklingError, TypeError, AttributeError):
        made = pickle.loads(raw)
        getattr(made, "close", int)()
    assert canary.exists(), "the weapon does not work: the test would show nothing"
    canary.unlink()

    for number, pack in enumerate(CONTAINERS.values()):
        status, message = refused(tmp_path, pack(raw), capsys, f"{number}.pt")
        assert status == 3, message
        assert f"names {name.partition(',')[0]!r}" in message
        assert "do not open it with other tools" in message
    assert not canary.exists()


# Functions that scanners' lists have missed, or that anyone would think of.
GLOBALS = (
    "os.popen", "nt.system", "subprocess.Popen", "shutil.rmtree", "webbrowser.open", "pip.main",
    "pip._internal.main", "runpy.run_path", "runpy._run_module_as_main", "types.CodeType",
    "types.FunctionType", "importlib.import_module", "importlib.machinery.SourceFileLoader",
    "marshal.loads", "pickle.loads", "_pickle.loads", "dill.loads", "joblib.load", "torch.load",
    "torch.serialization.load", "torch.hub.load", "torch.jit.load", "torch.jit.script",
    "torch.jit.unsupported_tensor_ops.execWrapper", "torch._dynamo.guards.GuardBuilder.get",
    "torch.utils._config_module.ConfigModule.load_config", "torch.package.PackageImporter",
    "torch.utils.bottleneck.__main__.run_cprofile", "torch.utils.collect_env.run",
    "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression",
    "torch.multiprocessing.reductions.rebuild_cuda_tensor", "torch.storage._load_from_bytes",
    "torch._utils._rebuild_tensor_v2.__globals__", "torch._utils._import_dotted_name",
    "torch._utils._rebuild_wrapper_subclass", "torch.FloatStorage.__init__", "torch.Generator",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray",
    "numpy.ctypeslib.load_library", "numpy.load", "numpy.f2py.crackfortran.getlincoef",
    "numpy.testing._private.utils.runstring", "ctypes.CDLL", "collections.namedtuple",
    "collections.OrderedDict.__init__", "collections.OrderedDict.fromkeys", "collections.UserDict",
    "typing.Any.__class__", "argparse.ArgumentParser", "argparse.FileType", "builtins.type",
    "builtins.vars", "builtins.compile", "builtins.breakpoint", "builtins.print",
    "builtins.bytearray", "builtins.object", "copyreg._reconstructor", "copyreg.__newobj__",
    "copy_reg._reconstructor", "_codecs.decode", "codecs.decode", "operator.attrgetter",
    "operator.itemgetter", "functools.reduce", "itertools.starmap", "asyncio.run", "pdb.run",
    "bdb.Bdb.run", "trace.Trace.run", "profile.Profile.runctx", "doctest.debug_script",
    "ensurepip._run_pip", "idlelib.autocomplete.AutoComplete.get_entity", "lib2to3.main.main",
    "lib2to3.pgen2.grammar.Grammar.loads", "logging.config._resolve", "logging.FileHandler",
    "pathlib.Path.write_text", "pathlib.Path", "urllib.request.urlopen", "requests.get",
    "http.client.HTTPSConnection", "socket.create_connection", "smtplib.SMTP", "sqlite3.connect",
    "tempfile.mktemp", "venv.create", "zipimport.zipimporter", "sys.exit", "signal.raise_signal",
    "faulthandler._sigsegv", "gc.get_objects", "threading.Thread", "multiprocessing.Process",
    "transformers.AutoModel.from_pretrained", "yaml.unsafe_load", "jinja2.Template", "__main__.x",
    "torch", ".os.system", "os.", "posix.system\x1b[2J", "\uff4fs.system", "torch .FloatStorage",
)  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_other_function_is_refused_by_name(tmp_path: Path, protocol: int) -> None:
    assert len(set(GLOBALS)) == len(GLOBALS) >= 100
    path = tmp_path / "m.pt"
    for dotted in GLOBALS:
        module, _, name = dotted.rpartition(".")
        first_dot, _, rest = dotted.partition(".")
        names = {(module, name)} if protocol == 2 else {(module, name), (first_dot, rest)}
        for first, second in sorted(names):
            named = (
                code(Name(first, second)) if protocol == 2
                else code(first) + code(second) + b"\x93"
            )  # fmt: skip
            path.write_bytes(archive(program(named + code(("touch canary",)) + b"R", protocol)))

            with pytest.raises(UnsafeError, match="the pickle names '") as caught:
                open_checkpoint(path)

            assert repr(f"{first}.{second}")[1:-1] in caught.value.what
            assert caught.value.what.isprintable()


def one(*parts: bytes) -> bytes:
    return program(b"".join(parts))


ORDERED, NAMESPACE = Name("collections", "OrderedDict"), Name("argparse", "Namespace")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
# What the pickle does, its bytes, the exit code, words of the message
MISUSED: list[tuple[str, bytes, int, str]] = [
    ("a call of a class that is only kept", program(Call(NAMESPACE, ())), 3, "calls 'argparse"),
    ("a call of a dtype", program(Call(Name("torch", "float32"), ())), 3, "calls 'torch.float32'"),
    ("a call of a storage", program(Call(Name("torch", "FloatStorage"), ())), 3, "calls 'torch.Fl"),
    ("a call of a text", program(Call("os.system", ("x",))), 3, "calls 'os.system'"),
    ("a call of a number", program(Call(5, ())), 3, "calls 5"),
    ("a call of a list", program(Call([], ())), 3, "calls a list"),
    ("a call of a tensor", program(Call(tensor(), ())), 3, "calls a tensor"),
    ("a call without a tuple", one(code(ORDERED), b"]R"), 2, "arguments of collections.Ordered"),
    ("a call with too few", program(Call(REBUILD, (1,))), 2, "gets 1 arguments"),
    ("a call with too many", program(Call(Name("_codecs", "encode"), ("", "", ""))), 2, "gets 3"),
    ("a rebuild by another", program(Call(Name("torch._tensor", "_rebuild_from_type_v2"), (
        ORDERED, Name("torch", "Tensor"), (), None))), 3, "calls 'collections.OrderedDict'"),
    ("a rebuild by a text", program(Call(Name("torch._tensor", "_rebuild_from_type_v2"), (
        "x", Name("torch", "Tensor"), (), None))), 2, "rebuilt by 'x'"),
    ("state of a function", one(code(REBUILD), code({"__code__": 1}), b"b"), 3, "sets the state"),
    ("state of a tensor", one(code(tensor()), code({"data": 1}), b"b"), 3, "state of a tensor"),
    ("state of a list", one(b"]}b"), 3, "sets the state of a list"),
    ("items of a tensor", one(code(tensor()), code("a"), b"Ns"), 3, "sets items of a tensor"),
    ("items of a storage", one(code(storage()), b"(", code("a"), b"Nu"), 3, "items of a storage"),
    ("items of a list", one(b"]K\0K\1s"), 3, "sets items of a list"),
    ("appending to a dict", one(b"}Na"), 3, "appends to a dict"),
    ("appending to a storage", one(code(storage()), b"(Ne"), 3, "appends to a storage"),
    ("NEWOBJ of a function", one(code(REBUILD), b")\x81"), 3, "NEWOBJ) of 'torch._utils"),
    ("NEWOBJ of a text", one(code("os.system"), b")\x81"), 3, "NEWOBJ) of 'os.system'"),
    ("NEWOBJ_EX", one(code(ORDERED), b")}\x92"), 3, "uses NEWOBJ_EX"),
    ("INST of a dict", one(b"(icollections\nOrderedDict\n"), 3, "(INST) of 'collections"),
    ("OBJ of a dict", one(b"(", code(ORDERED), b"o"), 3, "(OBJ) of collections"),
    ("OBJ of nothing", one(b"(o"), 3, "(OBJ) of None"),
    ("EXT1", one(b"\x82\xf0"), 3, "uses EXT1"),
    ("EXT2", one(b"\x83\xf0\0"), 3, "uses EXT2"),
    ("EXT4", one(b"\x84\xf0\0\0\0"), 3, "uses EXT4"),
    ("PERSID", one(b"Pos.system\n"), 3, "uses PERSID"),
    ("NEXT_BUFFER", one(b"\x97"), 3, "uses NEXT_BUFFER"),
    ("READONLY_BUFFER", one(b"\x98"), 3, "uses READONLY_BUFFER"),
    ("a persistent id of text", one(code("os.system"), b"Q"), 3, "persistent id"),
    ("a persistent id of nothing", one(b")Q"), 3, "persistent id"),
    ("a persistent id of another kind", program(Stored(("code", 1, 2, 3, 4))), 3, "persistent id"),
    ("a module of no class", program(Stored(("module", "os", "x.py", "import os"))), 3,
     "persistent id"),
    ("a storage of a function", program(Stored(("storage", REBUILD, "0", "cpu", 4))), 3,
     "storage of type torch._utils"),
    ("a storage of text", program(Stored(("storage", "torch", "0", "cpu", 4))), 3, "type 'torch'"),
    ("a storage with a path", program({"a": tensor(of=storage("../../x"))}), 2, "not in the file"),
    ("a storage called 5", program(storage(5)), 2, "called 5"),
    ("a storage not there", program({"a": tensor(of=storage("9"))}), 2, "'9' is not in the file"),
    ("a storage too large", program({"a": tensor(of=storage("0", 5))}), 2, "20 bytes, it has 16"),
    ("a storage too small", program({"a": tensor((0), (1,), (1,), storage("0", 2))}), 2, "8 bytes"),
    ("a storage of two sizes", program([storage(), storage("0", 5)]), 2, "16 and 20 bytes"),
    ("a storage of -1", program(storage("0", -1)), 2, "not a natural number"),
    ("a storage of True", program(storage("0", True)), 2, "is True, not a natural"),
    ("a storage of 2^63", program(storage("0", 2**63)), 2, "not a natural number"),
    ("a part beyond the storage", program(Stored((
        "storage", Name("torch", "FloatStorage"), "0", "cpu", 4, ("1", 3, 2)))), 2, "beyond"),
    ("a part that is none", program(Stored((
        "storage", Name("torch", "FloatStorage"), "0", "cpu", 4, 7))), 2, "given as 7"),
    ("an offset of -1", program({"a": tensor(-1)}), 2, "offset is -1"),
    ("an offset beyond", program({"a": tensor(1)}), 2, "reaches to byte 20"),
    ("an offset of 2^62", program({"a": tensor(2**62)}), 2, "reaches to byte"),
    ("an offset of text", program({"a": tensor("0")}), 2, "offset is '0'"),
    ("a size beyond", program({"a": tensor(0, (3, 2))}), 2, "reaches to byte 24"),
    ("a stride beyond", program({"a": tensor(0, (2, 2), (3, 1))}), 2, "reaches to byte 20"),
    ("a stride of -1", program({"a": tensor(3, (2,), (-1,))}), 2, "stride is -1"),
    ("a size of -1", program({"a": tensor(0, (-1,), (1,))}), 2, "size is -1"),
    ("a size of text", program({"a": tensor(0, "22", (1, 1))}), 2, "size is '22'"),
    ("more sizes than strides", program({"a": tensor(0, (2, 2), (1,))}), 2, "2 sizes and 1 str"),
    ("33 dims", program({"a": tensor(0, (1,) * 33, (1,) * 33)}), 2, "up to 32 numbers"),
    ("a tensor of no storage", program({"a": tensor(of="x")}), 2, "storage is 'x'"),
    ("a parameter of text", program(Call(Name("torch._utils", "_rebuild_parameter"), (
        "x", True, None))), 2, "parameter's data is 'x'"),
    ("a dtype that is none", program(Call(Name("torch._utils", "_rebuild_tensor_v3"), (
        storage(), 0, (1,), (1,), False, None, ORDERED))), 2, "dtype is collections"),
    ("flags that are no dict", program({"a": Call(REBUILD, (
        storage(), 0, (1,), (1,), False, None, "conj"))}), 2, "conjugated"),
    ("a view of 2^40 elements", program({"a": tensor(0, (2**40,), (0,))}), 3, "a bomb"),
    ("many views", program({f"{n}": tensor(0, (2**20,), (0,)) for n in range(300)}), 3, "a bomb"),
    ("a dict of text", program(Call(ORDERED, ("x",))), 2, "a dict is made of 'x'"),
    ("a dict of texts", program(Call(ORDERED, (["xy"],))), 2, "made of 'xy', not of pairs"),
    ("a dict with half a pair", one(b"(Nd"), 2, "a key without a value"),
    ("half a pair set", one(b"}(Nu"), 2, "a key without a value"),
    ("a set of text", program(Call(Name("builtins", "set"), ("x",))), 2, "a set is made of 'x'"),
    ("bytes as rot13", program(Call(Name("_codecs", "encode"), ("x", "rot13"))), 2, "as 'rot13'"),
    ("a scalar of no dtype", program(Call(Name("numpy.core.multiarray", "scalar"), ("x", ""))), 2,
     "numpy scalar is made"),
    ("an empty stack", one(b"0"), 2, "a mark that is not there"),
    ("nothing to end with", one(), 2, "an empty stack"),
    ("nothing to copy", one(b"2"), 2, "an empty stack"),
    ("no mark", one(b"t"), 2, "a mark that is not there"),
    ("an unknown operation", one(b"\xff"), 2, "the byte 0xff"),
    ("protocol 9", program(b"", 9), 2, "protocol 9"),
    ("recalling what was never put", one(b"h\7"), 2, "recalls 7"),
    ("remembering at -1", one(b"Np-1\n"), 2, "remembers something as -1"),
    ("a global of bytes", one(b"C\2osC\6system\x93"), 2, "names a global b'os'"),
    ("a global of numbers", one(b"K\1K\2\x93"), 2, "names a global 1, 2"),
    ("a text that is not UTF-8", one(b"X\1\0\0\0\xff"), 2, "cannot be read"),
    ("a number of 5,000 digits", one(b"I" + b"9" * 4000 + b"\n"), 2, "4,000 digits"),
    ("a number of 2,000 bytes", one(b"\x8b\xd0\7\0\0" + bytes(2000)), 2, "2,000 digits"),
    ("a number that is none", one(b"Ix\n"), 2, "cannot be read"),
    ("a float that is none", one(b"Fx\n"), 2, "cannot be read"),
    ("an endless line", one(b"I" + b"1" * 9000), 2, "endless line"),
    ("a string with escapes", one(b"S'\\x41'\n"), 2, "protocol 0"),
    ("a string without quotes", one(b"Sx\n"), 2, "protocol 0"),
    ("a text of 2^62 bytes", one(b"\x8d" + bytes(7) + b"\x40"), 2, "truncated"),
    ("two pickles", GOOD + GOOD, 2, "bytes follow the pickle"),
    ("no end", GOOD[:-1], 2, "truncated"),
    ("nothing", b"", 2, "truncated"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "status", "words"), [row[1:] for row in MISUSED], ids=[row[0] for row in MISUSED]
)
def test_what_no_pickler_of_tensors_writes_is_refused(
    tmp_path: Path, raw: bytes, status: int, words: str
) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(archive(raw))

    with pytest.raises((UnsafeError, InvalidFileError)) as caught:
        open_checkpoint(path)

    assert words in caught.value.what
    assert caught.value.exit_code == status
    assert caught.value.fix


def test_copyregs_registry_is_not_asked(tmp_path: Path, capsys: Captured) -> None:
    canary = tmp_path / "canary"
    raw = one(b"\x82\xf0", code((f"touch {canary}",)), b"R")
    copyreg.add_extension("os", "system", 0xF0)
    try:
        pickle.loads(raw)
        assert canary.exists()
        canary.unlink()
        status, message = refused(tmp_path, archive(raw), capsys)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)

    assert (status, canary.exists()) == (3, False)
    assert "uses EXT1" in message


# --- exhaustion ----------------------------------------------------------------------------------


def laughs(start: bytes, mark: bytes) -> bytes:
    """Sixty containers, each of ten times the one before: 10^60 when written out."""
    level = b"(" + b"h\0" * 10 + mark + b"q\x000"
    return one(start + b"q\x000" + level * 60, b"}", code("a"), b"h\0s")


def chain(before: bytes, after: bytes, depth: int) -> bytes:
    return one(b"}", code("a"), before * depth + b"N" + after * depth, b"s")


BOMBS: dict[str, tuple[bytes, str]] = {
    "laughing lists": (laughs(b"]", b"l"), "nested too deeply"),
    "laughing tuples": (laughs(b")", b"t"), "nested too deeply"),
    "wide laughs": (
        one(b"}", code("a"), b"](" + b"N" * 9000 + b"eq\x000](" + b"h\0" * 9000 + b"es"), "nested"),
    "a deep tuple": (chain(b"", b"\x85", 100_000), "nested too deeply"),
    "a deep list": (chain(b"(", b"l", 90_000), "nested too deeply"),
    "a deep dict": (chain(b"(K\0", b"d", 60_000), "nested too deeply"),
    "a list in itself": (one(b"}", code("a"), b"]q\0h\0as"), "nested too deeply"),
    "a dict in itself": (one(b"}q\0", code("a"), b"h\0s"), "nested too deeply"),
    "endless work": (one(b"N0" * 150_000), "more than 250,000 operations"),
    "endless marks": (one(b"(" * 300_000), "more than 250,000 operations"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_soon(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an eighth of the budgets, to be quick."""
    assert pickles.MAX_OPCODES == pickles.MAX_NODES == 2_000_000
    monkeypatch.setattr(pickles, "MAX_OPCODES", 250_000)
    monkeypatch.setattr(pickles, "MAX_NODES", 250_000)
    raw, words = BOMBS[name]
    path = tmp_path / "m.pt"
    path.write_bytes(archive(raw))
    started = time.process_time()

    with pytest.raises(UnsafeError, match=words):
        open_checkpoint(path)

    assert time.process_time() - started < 10


def test_parameters_within_themselves_end(tmp_path: Path) -> None:
    holder = code(Name("torch.nn.modules.container", "ParameterDict")) + b")\x81q\0h\0b"
    path = tmp_path / "m.pt"
    path.write_bytes(archive(one(b"}", code("a"), holder, b"s")))

    with pytest.raises(InvalidFileError, match="no tensors"):
        open_checkpoint(path)


def test_a_pickle_that_is_too_long_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 2**20)
    path = tmp_path / "m.pt"
    path.write_bytes(archive(one(b"B" + struct.pack("<I", 2**21) + bytes(2**21), b"0", code({}))))
    tracemalloc.start()
    try:
        with pytest.raises(UnsafeError, match="longer than 1 MiB"):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# --- archives ------------------------------------------------------------------------------------


def patched(content: bytes, name: bytes, offset: int, value: bytes, *, header: bytes) -> bytes:
    """A zip with bytes changed in the local ("PK 3 4") or central ("PK 1 2") header of a file."""
    at = content.index(header)
    while True:
        size = 30 if header == LOCAL else 46
        if content[at + size :].startswith(name):
            return content[: at + offset] + value + content[at + offset + len(value) :]
        at = content.index(header, at + 1)


LOCAL, CENTRAL = b"PK\3\4", b"PK\1\2"
PLAIN = archive(GOOD)


def doubled() -> bytes:
    stream = io.BytesIO(PLAIN)
    with zipfile.ZipFile(stream, "a") as packed, pytest.warns(UserWarning, match="Duplicate"):
        packed.writestr("m/data/0", b"x" * 16)
    return stream.getvalue()


def offset_of(content: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        return packed.getinfo(name).header_offset.to_bytes(4, "little")


ARCHIVES: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "TorchScript": (lambda: archive(GOOD, {"m/code/__torch__.py": b"", "m/constants.pkl": GOOD}), 3,
                    "TorchScript"),
    "constants.pkl": (lambda: archive(GOOD, {"m/constants.pkl": GOOD}), 3, "TorchScript"),
    "another pickle": (lambda: archive(GOOD, {"m/evil.pkl": GOOD}), 3, "'m/evil.pkl', which torch"),
    "a pickle elsewhere": (lambda: archive(GOOD, {"n/data.pkl": GOOD}), 3, "2 pickles, not one"),
    "a file outside": (lambda: archive(GOOD, {"setup.py": b""}), 3, "'setup.py', which torch"),
    "a storage called so": (lambda: archive(GOOD, {"m/data/x.py": b""}), 3, "'m/data/x.py'"),
    "a path upwards": (lambda: archive(GOOD, {"m/../../x": b""}), 3, "leaves its folder"),
    "an absolute path": (lambda: archive(GOOD, {"/etc/x": b""}), 3, "leaves its folder"),
    "a path of Windows": (lambda: archive(GOOD, {"C:/x": b""}), 3, "leaves its folder"),
    "a file twice": (doubled, 3, "'m/data/0' twice"),
    "no pickle": (lambda: PLAIN.replace(b"data.pkl", b"data.txt"), 2, "without a `data.pkl`"),
    "compressed": (lambda: archive(GOOD + bytes(10**6), method=zipfile.ZIP_DEFLATED), 2,
                   "is compressed"),
    "big-endian": (lambda: archive(GOOD, {"m/byteorder": b"big"}), 2, "b'big'-endian"),
    "encrypted": (lambda: patched(PLAIN, b"m/data/0", 8, b"\1\0", header=CENTRAL), 2, "encrypted"),
    "unknown flags": (lambda: patched(PLAIN, b"m/data/0", 8, b"\0\x20", header=CENTRAL), 2, "flag"),
    "two names": (lambda: patched(PLAIN, b"m/data/0", 30, b"m/data/1", header=LOCAL), 3, "agree"),
    "two sizes": (lambda: patched(PLAIN, b"m/data/0", 22, b"\x11", header=LOCAL), 3, "disagree"),
    "two methods": (lambda: patched(PLAIN, b"m/data/0", 8, b"\x08", header=LOCAL), 3, "disagree"),
    "one place for two": (lambda: patched(archive(GOOD, {"m/data/1": bytes(16)}).replace(
        b"m/data/1", b"m/data/0", 1), b"m/data/1", 42, offset_of(PLAIN, "m/data/0"),
        header=CENTRAL), 3, "disagree"),
    "a name that is not UTF-8": (lambda: PLAIN.replace(b"m/version", b"m/vers\xffon"), 2, "UTF-8"),
    "a comment": (lambda: PLAIN[:-2] + b"\4\0evil", 2, "directory"),
    "a comment that ends as a zip": (lambda: PLAIN[:-2] + b"\1\0", 2, "comment"),
    "text before": (lambda: b"PK\3\4" + PLAIN, 2, "directory"),
    "more files than said": (lambda: PLAIN[:-12] + b"\7\0" + PLAIN[-10:], 2, "says it has 7"),
    "a directory elsewhere": (lambda: PLAIN[:-6] + b"\0\0\0\1" + PLAIN[-2:], 2, "outside the file"),
    "a damaged directory": (lambda: PLAIN.replace(CENTRAL, b"PK\1\1"), 2, "damaged"),
    "a place beyond the end": (lambda: patched(PLAIN, b"m/data/0", 42, b"\0\0\0\x7f",
                                               header=CENTRAL), 2, "outside the file"),
    "a size without its field": (lambda: patched(PLAIN, b"m/data/0", 24, b"\xff" * 4,
                                                 header=CENTRAL), 2, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_can_be_read_in_two_ways_are_refused(
    tmp_path: Path, capsys: Captured, name: str
) -> None:
    make, expected, words = ARCHIVES[name]

    with contextlib.suppress(UserWarning):
        status, message = refused(tmp_path, make(), capsys)

    assert words in message
    assert status == expected


def test_files_that_overlap_are_refused(tmp_path: Path) -> None:
    """The bytes of one storage hold another file of the zip, header and all."""
    inner = (
        struct.pack("<4s5H3I2H", LOCAL, 20, 0, 0, 0, 33, 0, 16, 16, 8, 0) + b"m/data/1" + bytes(16)
    )
    content = archive(GOOD, {"m/data/2": inner, "m/data/1": bytes(16)})
    at = content.index(inner)
    path = tmp_path / "m.pt"
    path.write_bytes(patched(content, b"m/data/1", 42, at.to_bytes(4, "little"), header=CENTRAL))

    with pytest.raises(UnsafeError, match=r"overlaps another file|disagree"):
        open_checkpoint(path)


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as packed:
        for name in ("storages", "tensors", "pickle"):
            raw = program(Call(Name("os", "system"), ("touch canary",)))
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            packed.addfile(info, io.BytesIO(raw))
    return stream.getvalue()


def test_the_tar_format_is_refused_unread(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    status, message = refused(tmp_path, tar(), capsys)

    assert status == 2
    assert "a tar archive" in message
    assert "do not load it with torch" in message
    assert not Path("canary").exists()


LEGACY: dict[str, tuple[bytes, str]] = {
    "another pickle": (program({"a": 1}), "not one of torch.save"),
    "True as magic": (program(True), "not one of torch.save"),
    "another version": (program(0x1950A86A20F9469CFC6C) + program(7), "unknown torch format 7"),
    "big-endian": (program(0x1950A86A20F9469CFC6C) + program(1001)
                   + program({"little_endian": False}), "not little-endian"),
    "no list of storages": (legacy(GOOD, {}, bytes(24)), "does not fit"),
    "storages too few": (legacy(GOOD, (), bytes(24)), "does not fit"),
    "a storage twice": (legacy(GOOD, ("0", "0"), bytes(48)), "does not fit"),
    "a storage called 0": (legacy(GOOD, (0,), bytes(24)), "does not fit"),
    "a count too large": (legacy(GOOD, ("0",), b"\5" + bytes(23)), "16 bytes, it says 20"),
    "a count of 2^64 - 1": (legacy(GOOD, ("0",), b"\xff" * 8 + bytes(16)), "it says"),
    "cut": (legacy(GOOD, ("0",), b"\4" + bytes(22)), "truncated"),
    "more behind": (legacy(GOOD, ("0",), b"\4" + bytes(24)), "1 bytes follow"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGACY)
def test_old_files_that_contradict_themselves_are_refused(tmp_path: Path, name: str) -> None:
    content, words = LEGACY[name]
    path = tmp_path / "m.pt"
    path.write_bytes(content)

    with pytest.raises(InvalidFileError, match=words):
        open_checkpoint(path)


def flipped() -> Iterator[bytes]:
    """The good files with every byte of their structure changed, one at a time."""
    for content in (PLAIN, legacy(GOOD, ("0",), b"\4" + bytes(23))):
        for at in range(len(content)):
            yield content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]


def test_a_changed_byte_gives_an_error_that_has_a_name_or_the_same_layout(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    errors = 0
    for content in flipped():
        path.write_bytes(content)
        try:
            with pickles.open_pickle(path) as checkpoint:
                for name, spec in checkpoint.items():
                    assert len(checkpoint.read(name)) == spec.nbytes
        except (InvalidFileError, UnsafeError):
            errors += 1

    assert errors > 500
