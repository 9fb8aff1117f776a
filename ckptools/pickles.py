"""PyTorch pickles (`.ckpt`, `.pt`, `.bin`) as checkpoints, without torch and without unpickling.

A pickle is a program. This module interprets that program with its own small machine, which has
no way to import, to look up an attribute, or to call anything: a global is a pair of strings that
must stand in a closed table, and "calling" one runs a function of this module on plain data. What
comes out is a list of tensors with their places in the file; the values are read later, as those
of any checkpoint.

When a file is refused, the exit code says why:

* `UnsafeError` (3): made to do something to whoever opens it. Code (a global outside the table, a
  call of what is no constructor, TorchScript), two readings of one file (duplicate or overlapping
  zip entries, headers that disagree, members nobody writes), or exhaustion (the budgets below).
* `InvalidFileError` (2): damaged (cut, or tensors beyond their storage), or of a kind that is not
  read (tar, compressed, big-endian, quantised).

Sources: the pickle opcodes of CPython 3.13, `Lib/pickletools.py`; torch 2.13, `serialization.py`
(`_save`, `_legacy_save`, `persistent_load`), `_utils.py` (`_rebuild_*`) and
`_tensor.py` (`_rebuild_from_type_v2`); zip: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import hashlib
import math
import reprlib
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ckptools.checkpoint import (
    Checkpoint,
    Descriptor,
    Extent,
    Header,
    Identity,
    SourceFile,
    Tensors,
    open_file,
)
from ckptools.errors import InvalidFileError, UnsafeError
from ckptools.tensors import DTYPES, TensorSpec

MAX_PICKLE_BYTES = 64 * 2**20
MAX_DIRECTORY_BYTES = 64 * 2**20
# A checkpoint of SDXL with its optimizer's states takes about 300,000.
MAX_OPCODES = 2_000_000
MAX_NODES = 2_000_000
MAX_DEPTH = 32
MAX_RANK = 32
# Views may repeat a storage's bytes, but all tensors together not more than so often.
MAX_EXPANSION = 16
_FREE_BYTES = 2**30
_MAX_LINE = 4096
_MAX_INTEGER_BYTES = 1024
_MAX_NAME = 1024
_MOST_LISTED = 4

_ZIP = b"PK\x03\x04"
_PROTOCOLS = tuple(b"\x80" + bytes([number]) for number in (2, 3, 4, 5))
_TAR = (257, b"ustar")
_SNIFF_BYTES = 512

_SAFETENSORS = "use the .safetensors release of the model"
_DISTRUST = f"do not open it with other tools; {_SAFETENSORS}"
_AGAIN = "download or copy the file again"
_UNPACK = "unpack it, and give the model that is in it"

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


def _shown(text: object) -> str:
    return _REPR.repr(text)


# --- the closed tables ----------------------------------------------------------------------------

Name = tuple[str, str]

# Element sizes of what a storage may hold; only what safetensors has too becomes a tensor.
_ITEM_BYTES = {
    row.torch_name: row.bits // 8 for row in DTYPES.values() if row.torch_name
} | {"complex128": 16, "complex32": 4}  # fmt: skip
_SPEC_DTYPES = {row.torch_name: row.name for row in DTYPES.values() if row.torch_name}

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "int8", "QUInt8Storage": "uint8", "QInt32Storage": "int32",
}  # fmt: skip
_UNTYPED = frozenset({("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")})

# dicts, whatever they are called
_MAPPINGS: frozenset[Name] = frozenset({
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("pytorch_lightning.utilities.parsing", "AttributeDict"),
    ("lightning_fabric.utilities.data", "AttributeDict"),
    ("lightning.fabric.utilities.data", "AttributeDict"),
})  # fmt: skip
# Classes whose objects are kept as class and state; nothing is made of them but tensors inside.
_PARAMETERS: Name = ("torch.nn.modules.container", "ParameterDict")
_OBJECTS: frozenset[Name] = frozenset({
    _PARAMETERS,
    ("argparse", "Namespace"),
    ("omegaconf.dictconfig", "DictConfig"),
    ("omegaconf.listconfig", "ListConfig"),
    ("omegaconf.base", "ContainerMetadata"),
    ("omegaconf.base", "Metadata"),
    ("omegaconf.nodes", "AnyNode"),
})  # fmt: skip
# Named, as keys or values, but never called.
_NAMED: frozenset[Name] = frozenset({
    ("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer"),
    ("torch", "per_tensor_affine"), ("torch", "per_channel_affine"),
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("pytorch_lightning.callbacks.early_stopping", "EarlyStopping"),
    ("pytorch_lightning.callbacks.lr_monitor", "LearningRateMonitor"),
    ("lightning.pytorch.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("lightning.pytorch.callbacks.early_stopping", "EarlyStopping"),
    ("typing", "Any"),
    *((module, name) for module in ("builtins", "__builtin__")
      for name in ("int", "long", "float", "bool", "str", "unicode", "list", "dict", "tuple")),
})  # fmt: skip
# Constructors of tensors that safetensors cannot hold; an error only where one is wanted.
_UNREAD: Mapping[Name, str] = {
    ("torch._utils", "_rebuild_qtensor"): "a quantised tensor",
    ("torch._utils", "_rebuild_sparse_tensor"): "a sparse tensor",
    ("torch._utils", "_rebuild_nested_tensor"): "a nested tensor",
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): "a tensor without values (meta)",
}
# numpy's scalars, as `global_step` and losses are often stored
_NUMPY_NUMBERS = {
    "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b", "u8": "<Q", "u4": "<I", "u2": "<H", "u1": "<B",
    "f8": "<d", "f4": "<f", "f2": "<e", "b1": "<?",
}  # fmt: skip

_METADATA_KEYS = ("global_step", "epoch", "step", "name", "sd_checkpoint", "sd_checkpoint_name")
# Where the weights may stand in the outermost dict; EMA weights are those meant for use.
_ALWAYS_WRAPPER = "state_dict"
_WRAPPERS = ("params_ema", "params", "model_state_dict", "model", "module")
_ASIDE = frozenset({
    "optimizer", "optimizers", "optimizer_state", "optimizer_states", "optimizer_state_dict",
    "scheduler", "lr_scheduler", "lr_schedulers", "callbacks", "loops", "scaler", "amp_scaler",
    "native_amp_scaling_state", "hyper_parameters", "args", "config", "rng_state",
})  # fmt: skip


# --- what the machine makes -----------------------------------------------------------------------


class _BrokenError(Exception):
    """The pickle is not one that a pickler writes; carried out of the machine."""


class _HostileError(Exception):
    """The pickle asks for what no list of tensors needs; carried out of the machine."""


@dataclass(frozen=True, eq=False, slots=True)
class _Global:
    """An entry of the tables. Not a class, not a function: two strings."""

    name: Name


@dataclass(frozen=True, eq=False, slots=True)
class _Dict:
    """A dict as the pairs that were put into it: nothing is hashed, so no key can be costly."""

    pairs: list[tuple[object, object]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Object:
    """An instance of one of `_OBJECTS`, or another thing that is kept unread."""

    name: Name
    state: object = None


@dataclass(frozen=True, eq=False, slots=True)
class _Storage:
    """A run of bytes of the storage `key`, seen as elements of `dtype` (torch's name)."""

    key: str
    dtype: str
    start: int
    nbytes: int


@dataclass(frozen=True, eq=False, slots=True)
class _Tensor:
    """A view of a storage. offset, strides: in elements; checked against the storage's size.

    problem  why it cannot be read, or ""
    """

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    problem: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def span(self) -> tuple[int, int]:
        """First byte and end, within the storage, of what it shows."""
        item = _ITEM_BYTES[self.dtype]
        start = self.storage.start + self.offset * item
        return start, start + _reach(self.shape, self.strides) * item


@dataclass(frozen=True, eq=False, slots=True)
class _Unread:
    """A tensor of a kind that is not read, such as a quantised one."""

    kind: str


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first that a view shows to the last, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


# --- what stands for a call -----------------------------------------------------------------------


def _natural(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _BrokenError(f"{what} is {_brief(value)}, not a natural number")
    return value


def _naturals(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > MAX_RANK:
        raise _BrokenError(f"{what} is {_brief(value)}, not up to {MAX_RANK} numbers")
    return tuple(_natural(item, what) for item in value)


def _brief(value: object) -> str:
    """A value as a message shows it; never walks into one, they may be cyclic or vast."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return _shown(value)
    if isinstance(value, _Global):
        return ".".join(value.name)
    return "a " + type(value).__name__.strip("_").lower()


def _view(
    storage: object, offset: object, shape: object, strides: object, dtype: str = "",
    metadata: object = None,
) -> _Tensor:  # fmt: skip
    if not isinstance(storage, _Storage):
        raise _BrokenError(f"a tensor's storage is {_brief(storage)}")
    dtype = dtype or storage.dtype
    first = _natural(offset, "a tensor's offset")
    sizes, steps = _naturals(shape, "a tensor's size"), _naturals(strides, "a tensor's stride")
    if len(sizes) != len(steps):
        raise _BrokenError(f"a tensor has {len(sizes)} sizes and {len(steps)} strides")
    problem = ""
    if metadata is not None:
        flags = metadata.pairs if isinstance(metadata, _Dict) else [("", True)]
        if any(flag is not False for _, flag in flags):
            problem = "a conjugated or negated view"
    tensor = _Tensor(storage, dtype, first, sizes, steps, problem)
    if tensor.nbytes and tensor.span[1] > storage.start + storage.nbytes:
        raise _BrokenError(
            f"a tensor reaches to byte {tensor.span[1] - storage.start:,} of the storage "
            f"{_shown(storage.key)}, which has {storage.nbytes:,}"
        )
    return tensor


def _rebuild_tensor(storage: object, offset: object, shape: object, strides: object) -> object:
    return _view(storage, offset, shape, strides)


def _rebuild_tensor_v2(
    storage: object, offset: object, shape: object, strides: object, _grad: object, _hooks: object,
    metadata: object = None,
) -> object:  # fmt: skip
    return _view(storage, offset, shape, strides, metadata=metadata)


def _rebuild_tensor_v3(
    storage: object, offset: object, shape: object, strides: object, _grad: object, _hooks: object,
    dtype: object, metadata: object = None,
) -> object:  # fmt: skip
    name = dtype.name if isinstance(dtype, _Global) else ("", "")
    if name[0] != "torch" or name[1] not in _ITEM_BYTES:
        raise _BrokenError(f"a tensor's dtype is {_brief(dtype)}")
    return _view(storage, offset, shape, strides, name[1], metadata)


def _rebuild_parameter(
    data: object, _grad: object, _hooks: object, _state: object = None
) -> object:
    if not isinstance(data, _Tensor | _Unread):
        raise _BrokenError(f"a parameter's data is {_brief(data)}")
    return data


def _rebuild_from_type(rebuild: object, _type: object, args: object, _state: object) -> object:
    """A tensor with attributes of its own, or a subclass: the tensor."""
    if not isinstance(rebuild, _Global) or not isinstance(args, tuple):
        raise _BrokenError(f"a tensor is rebuilt by {_brief(rebuild)}")
    if rebuild.name not in _TENSOR_BUILDERS and rebuild.name not in _UNREAD:
        raise _HostileError(f"calls {'.'.join(rebuild.name)!r}")
    return _call(rebuild, args)


def _ordered_dict(pairs: object = ()) -> object:
    if not isinstance(pairs, tuple | list):
        raise _BrokenError(f"a dict is made of {_brief(pairs)}")
    result = _Dict()
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise _BrokenError(f"a dict is made of {_brief(pair)}, not of pairs")
        result.pairs.append((pair[0], pair[1]))
    return result


def _default_dict(_factory: object = None) -> object:
    return _Dict()


def _size(sizes: object = ()) -> object:
    return _naturals(sizes, "a torch.Size")


def _device(*_: object) -> object:
    return _Object(("torch", "device"))


def _layout(*_: object) -> object:
    return _Object(("torch", "layout"))


def _collection(items: object = ()) -> object:
    if not isinstance(items, tuple | list):
        raise _BrokenError(f"a set is made of {_brief(items)}")
    return list(items)


def _encode(text: object, encoding: object) -> object:
    """How protocol 2 spells bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _BrokenError(f"bytes are made of {_brief(text)} as {_brief(encoding)}")
    return text.encode("latin-1")


def _numpy_dtype(code: object, *_: object) -> object:
    return _Object(("numpy", "dtype"), [code])


def _numpy_scalar(dtype: object, data: object = b"") -> object:
    """The number, where it is a little-endian one; else a thing kept unread."""
    state = dtype.state if isinstance(dtype, _Object) and dtype.name == ("numpy", "dtype") else None
    if not isinstance(state, list) or not isinstance(data, bytes):
        raise _BrokenError(f"a numpy scalar is made of {_brief(dtype)} and {_brief(data)}")
    code = state[0]
    order = state[1][1] if len(state) > 1 and isinstance(state[1], tuple) and state[1][1:] else "<"
    layout = _NUMPY_NUMBERS.get(code, "") if isinstance(code, str) else ""
    if not layout or order not in ("<", "|") or struct.calcsize(layout) != len(data):
        return _Object(("numpy", "scalar"))
    number: object = struct.unpack(layout, data)[0]
    return number


def _path(*_: object) -> object:
    return _Object(("pathlib", "Path"))


_Builder = Callable[..., object]
_TENSOR_BUILDERS: Mapping[Name, _Builder] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}
_BUILDERS: Mapping[Name, _Builder] = {
    **_TENSOR_BUILDERS,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): _default_dict,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("torch.serialization", "_get_layout"): _layout,
    ("builtins", "set"): _collection,
    ("__builtin__", "set"): _collection,
    ("builtins", "frozenset"): _collection,
    ("__builtin__", "frozenset"): _collection,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _numpy_dtype,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
    ("pathlib", "PosixPath"): _path,
    ("pathlib", "WindowsPath"): _path,
    ("pathlib._local", "PosixPath"): _path,
    ("pathlib._local", "WindowsPath"): _path,
}


def _is_storage(name: Name) -> bool:
    return name in _UNTYPED or (name[0] in ("torch", "torch.cuda") and name[1] in _STORAGES)


def _is_listed(name: Name) -> bool:
    return (
        name in _BUILDERS
        or name in _MAPPINGS
        or name in _OBJECTS
        or name in _NAMED
        or name in _UNREAD
        or _is_storage(name)
        or (name[0] == "torch" and name[1] in _ITEM_BYTES)
    )


def _call(function: object, args: object) -> object:
    """What stands for `function(*args)`: a function of this module on plain data, or an error."""
    if not isinstance(function, _Global):
        raise _HostileError(f"calls {_brief(function)}, which is no listed constructor")
    if not isinstance(args, tuple):
        raise _BrokenError(f"the arguments of {_brief(function)} are {_brief(args)}")
    if function.name in _UNREAD:
        return _Unread(_UNREAD[function.name])
    builder = _BUILDERS.get(function.name)
    if builder is None:
        raise _HostileError(f"calls {_brief(function)!r}, which is no listed constructor")
    try:
        return builder(*args)
    except TypeError as exc:  # of the call itself: builders take any objects
        raise _BrokenError(f"{_brief(function)} gets {len(args)} arguments") from exc


# --- the machine ----------------------------------------------------------------------------------


class _Program:
    """The bytes of pickles from `start` on, read as they are needed, never beyond `end`."""

    def __init__(self, stream: Descriptor, start: int, end: int) -> None:
        self._stream, self._start, self._end = stream, start, end
        self._limit = min(end - start, MAX_PICKLE_BYTES)
        self._data = b""
        self.position = 0

    @property
    def offset(self) -> int:
        """Where the next byte lies in the file."""
        return self._start + self.position

    @property
    def read_bytes(self) -> bytes:
        """All bytes taken so far."""
        return self._data[: self.position]

    def _need(self, end: int) -> None:
        if end <= len(self._data):
            return
        if end > self._limit:
            if self._limit < self._end - self._start:
                raise _HostileError(f"is longer than {MAX_PICKLE_BYTES // 2**20} MiB")
            raise _BrokenError("is truncated")
        wanted = min(self._limit, max(end, 2 * len(self._data), 1 << 16))
        more = self._stream.read(wanted - len(self._data), self._start + len(self._data))
        self._data += more

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self._need(self.position + count)
        start, self.position = self.position, self.position + count
        return self._data[start : self.position]

    def number(self, count: int, *, signed: bool = False) -> int:
        """The next `count` bytes as a little-endian integer."""
        return int.from_bytes(self.take(count), "little", signed=signed)

    def sized(self, count: int) -> bytes:
        """As many bytes as the next `count` bytes say."""
        return self.take(self.number(count))

    def line(self) -> bytes:
        """The bytes before the next line feed, which is taken too."""
        start = self.position
        for size in (64, _MAX_LINE):
            end = min(start + size, max(self._limit, start + 1))
            self._need(end)
            found = self._data.find(b"\n", start, end)
            if found >= 0:
                self.position = found + 1
                return self._data[start:found]
        raise _BrokenError("has an endless line")


class _Machine:
    """Runs one pickle. Its stack holds plain data and the types above; it can do nothing else.

    storages  key → (dtype, bytes) of every storage that the pickle names
    """

    def __init__(self, program: _Program, opcodes: Iterator[int]) -> None:
        self._program, self._budget = program, opcodes
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self.storages: dict[str, tuple[str, int]] = {}

    def run(self) -> object:
        """The object that the pickle ends with."""
        program, table = self._program, _OPCODES
        while True:
            if next(self._budget, None) is None:
                raise _HostileError(f"has more than {MAX_OPCODES:,} operations")
            code = program.take(1)[0]
            if code == _STOP:
                return self.pop()
            operation = table.get(code)
            if operation is None:
                self._refuse(code)
            else:
                operation(self, program)

    @staticmethod
    def _refuse(code: int) -> None:
        if code in _HOSTILE_OPCODES:
            raise _HostileError(f"uses {_HOSTILE_OPCODES[code]}, which no list of tensors needs")
        raise _BrokenError(f"has the byte {code:#04x} where an operation should be")

    def push(self, value: object) -> None:
        self._stack.append(value)

    def pop(self) -> object:
        if not self._stack:
            raise _BrokenError("takes from an empty stack")
        return self._stack.pop()

    def top(self) -> object:
        if not self._stack:
            raise _BrokenError("looks at an empty stack")
        return self._stack[-1]

    def mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def pop_mark(self) -> list[object]:
        if not self._marks:
            raise _BrokenError("goes back to a mark that is not there")
        items, self._stack = self._stack, self._marks.pop()
        return items

    def drop(self) -> None:
        """POP takes a mark where one is on top."""
        if self._stack:
            self._stack.pop()
        else:
            self.pop_mark()

    def put(self, index: int | None = None) -> None:
        number = len(self._memo) if index is None else index
        if not 0 <= number < 2**32:
            raise _BrokenError(f"remembers something as {_shown(number)}")
        self._memo[number] = self.top()

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise _BrokenError(f"recalls {_shown(index)}, which it never remembered")
        self.push(self._memo[index])

    def find(self, module: object, name: object) -> _Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _BrokenError(f"names a global {_brief(module)}, {_brief(name)}")
        if not _is_listed((module, name)):
            raise _HostileError(
                f"names {_shown(f'{module}.{name}')}, which no list of tensors needs"
            )
        return _Global((module, name))

    def make(self, cls: object, *, how: str) -> None:
        """An instance of a listed class, without arguments."""
        if not isinstance(cls, _Global):
            raise _HostileError(f"makes an object ({how}) of {_brief(cls)}")
        if cls.name in _MAPPINGS:
            self.push(_Dict())
        elif cls.name in _OBJECTS:
            self.push(_Object(cls.name))
        else:
            raise _HostileError(f"makes an object ({how}) of {_brief(cls)!r}")

    def build(self) -> None:
        """BUILD: the state of an object. A dict's own attributes are of no use here."""
        state, target = self.pop(), self.top()
        if isinstance(target, _Dict):
            return
        if not isinstance(target, _Object):
            raise _HostileError(f"sets the state of {_brief(target)}")
        if target.name == ("numpy", "dtype") and isinstance(target.state, list):
            target.state = [target.state[0], state]
        else:
            target.state = state

    def set_items(self, items: Sequence[object]) -> None:
        target = self.top()
        if not isinstance(target, _Dict):
            raise _HostileError(f"sets items of {_brief(target)}")
        if len(items) % 2:
            raise _BrokenError("sets a key without a value")
        target.pairs.extend(zip(items[::2], items[1::2], strict=True))

    def append(self, items: Iterable[object]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise _HostileError(f"appends to {_brief(target)}")
        target.extend(items)

    def persistent(self) -> None:
        """BINPERSID: ("storage", type, key, location, numel[, None or (key, offset, numel)]).

        Or, in the legacy format, ("module", class, source file, source) for a class of torch.nn.
        """
        saved = self.pop()
        if not isinstance(saved, tuple) or not saved:
            raise _HostileError("has a persistent id that is not a storage")
        if saved[0] == "module" and len(saved) == 4 and isinstance(saved[1], _Global):
            self.push(saved[1])
            return
        if saved[0] != "storage" or len(saved) not in (5, 6):
            raise _HostileError("has a persistent id that is not a storage")
        _, kind, key, _location, numel, *view = saved
        if not isinstance(kind, _Global) or not _is_storage(kind.name):
            raise _HostileError(f"has a storage of type {_brief(kind)}")
        if not isinstance(key, str) or len(key) > _MAX_NAME:
            raise _BrokenError(f"has a storage called {_brief(key)}")
        dtype = "uint8" if kind.name in _UNTYPED else _STORAGES[kind.name[1]]
        item = _ITEM_BYTES[dtype]
        nbytes = _natural(numel, "a storage's size") * item
        known = self.storages.setdefault(key, (dtype, nbytes))
        if known[1] != nbytes:
            raise _BrokenError(f"gives the storage {_shown(key)} {known[1]:,} and {nbytes:,} bytes")
        start = 0
        if view and view[0] is not None:
            part = view[0]
            if not isinstance(part, tuple) or len(part) != 3:
                raise _BrokenError(f"has a part of a storage given as {_brief(part)}")
            start = _natural(part[1], "a part's offset") * item
            size = _natural(part[2], "a part's size") * item
            if start + size > nbytes:
                raise _BrokenError(f"has a part beyond the end of the storage {_shown(key)}")
            nbytes = size
        self.push(_Storage(key, dtype, start, nbytes))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _integer(data: bytes) -> int:
    if len(data) > _MAX_INTEGER_BYTES:
        raise _BrokenError(f"has a number of {len(data):,} digits or bytes")
    return int(data)


def _long(data: bytes) -> int:
    if len(data) > _MAX_INTEGER_BYTES:
        raise _BrokenError(f"has a number of {len(data):,} digits or bytes")
    return int.from_bytes(data, "little", signed=True)


def _old_string(data: bytes) -> object:
    """A string of Python 2: text where it can be, else bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _quoted(line: bytes) -> object:
    if len(line) < 2 or line[0] != line[-1] or line[:1] not in (b"'", b'"') or b"\\" in line:
        raise _BrokenError("has a string of protocol 0 that is not plain")
    return _old_string(line[1:-1])


def _old_int(line: bytes) -> object:
    return line == b"01" if line in (b"00", b"01") else _integer(line)


def _float(data: bytes) -> float:
    value: float = struct.unpack(">d", data)[0]
    return value


def _popped(machine: _Machine, count: int) -> tuple[object, ...]:
    return tuple([machine.pop() for _ in range(count)][::-1])


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(machine.find(module, name))


def _reduce(machine: _Machine) -> None:
    args, function = machine.pop(), machine.pop()
    machine.push(_call(function, args))


def _new_object(machine: _Machine) -> None:
    _args, cls = machine.pop(), machine.pop()
    machine.make(cls, how="NEWOBJ")


def _instance(machine: _Machine, program: _Program) -> None:
    cls = machine.find(_text(program.line()), _text(program.line()))
    raise _HostileError(f"makes an object (INST) of {_brief(cls)!r}")


def _object(machine: _Machine) -> None:
    items = machine.pop_mark()
    raise _HostileError(f"makes an object (OBJ) of {_brief(items[0] if items else None)}")


def _pairs(items: Sequence[object]) -> _Dict:
    if len(items) % 2:
        raise _BrokenError("has a dict with a key without a value")
    return _Dict(list(zip(items[::2], items[1::2], strict=True)))


def _set_item(machine: _Machine) -> None:
    machine.set_items(_popped(machine, 2))


def _append_one(machine: _Machine) -> None:
    machine.append([machine.pop()])


_STOP = ord(".")
# What they would do elsewhere: look up copyreg's registry, call with keywords, share memory.
_HOSTILE_OPCODES = {
    0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x92: "NEWOBJ_EX", ord("P"): "PERSID",
    0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}  # fmt: skip
_Operation = Callable[[_Machine, _Program], None]
_OPCODES: Mapping[int, _Operation] = {
    0x80: lambda m, p: _protocol(p.take(1)[0]),
    0x95: lambda m, p: _frame(p),
    # constants
    ord("N"): lambda m, p: m.push(None),
    0x88: lambda m, p: m.push(True),
    0x89: lambda m, p: m.push(False),
    ord("K"): lambda m, p: m.push(p.number(1)),
    ord("M"): lambda m, p: m.push(p.number(2)),
    ord("J"): lambda m, p: m.push(p.number(4, signed=True)),
    0x8A: lambda m, p: m.push(_long(p.sized(1))),
    0x8B: lambda m, p: m.push(_long(p.sized(4))),
    ord("I"): lambda m, p: m.push(_old_int(p.line())),
    ord("L"): lambda m, p: m.push(_integer(p.line().removesuffix(b"L"))),
    ord("F"): lambda m, p: m.push(float(p.line())),
    ord("G"): lambda m, p: m.push(_float(p.take(8))),
    0x8C: lambda m, p: m.push(_text(p.sized(1))),
    ord("X"): lambda m, p: m.push(_text(p.sized(4))),
    0x8D: lambda m, p: m.push(_text(p.sized(8))),
    ord("V"): lambda m, p: m.push(p.line().decode("raw-unicode-escape")),
    ord("S"): lambda m, p: m.push(_quoted(p.line())),
    ord("U"): lambda m, p: m.push(_old_string(p.sized(1))),
    ord("T"): lambda m, p: m.push(_old_string(p.sized(4))),
    ord("C"): lambda m, p: m.push(p.sized(1)),
    ord("B"): lambda m, p: m.push(p.sized(4)),
    0x8E: lambda m, p: m.push(p.sized(8)),
    0x96: lambda m, p: m.push(p.sized(8)),
    # the stack and the memo
    ord("("): lambda m, p: m.mark(),
    ord("0"): lambda m, p: m.drop(),
    ord("1"): lambda m, p: _discard(m.pop_mark()),
    ord("2"): lambda m, p: m.push(m.top()),
    ord("p"): lambda m, p: m.put(_integer(p.line())),
    ord("q"): lambda m, p: m.put(p.number(1)),
    ord("r"): lambda m, p: m.put(p.number(4)),
    0x94: lambda m, p: m.put(),
    ord("g"): lambda m, p: m.get(_integer(p.line())),
    ord("h"): lambda m, p: m.get(p.number(1)),
    ord("j"): lambda m, p: m.get(p.number(4)),
    # containers
    ord(")"): lambda m, p: m.push(()),
    0x85: lambda m, p: m.push(_popped(m, 1)),
    0x86: lambda m, p: m.push(_popped(m, 2)),
    0x87: lambda m, p: m.push(_popped(m, 3)),
    ord("t"): lambda m, p: m.push(tuple(m.pop_mark())),
    ord("]"): lambda m, p: m.push([]),
    ord("l"): lambda m, p: m.push(m.pop_mark()),
    ord("a"): lambda m, p: _append_one(m),
    ord("e"): lambda m, p: m.append(m.pop_mark()),
    ord("}"): lambda m, p: m.push(_Dict()),
    ord("d"): lambda m, p: m.push(_pairs(m.pop_mark())),
    ord("s"): lambda m, p: _set_item(m),
    ord("u"): lambda m, p: m.set_items(m.pop_mark()),
    0x8F: lambda m, p: m.push([]),
    0x90: lambda m, p: m.append(m.pop_mark()),
    0x91: lambda m, p: m.push(m.pop_mark()),
    # what elsewhere runs code
    ord("c"): lambda m, p: m.push(m.find(_text(p.line()), _text(p.line()))),
    0x93: lambda m, p: _stack_global(m),
    ord("R"): lambda m, p: _reduce(m),
    ord("b"): lambda m, p: m.build(),
    0x81: lambda m, p: _new_object(m),
    ord("i"): _instance,
    ord("o"): lambda m, p: _object(m),
    ord("Q"): lambda m, p: m.persistent(),
}


def _protocol(number: int) -> None:
    if number > 5:
        raise _BrokenError(f"is of protocol {number}, which does not exist")


def _frame(program: _Program) -> None:
    program.number(8)  # a hint for buffering; the operations within are read like all others


def _discard(_: list[object]) -> None:
    return None


def _execute(program: _Program, budget: Iterator[int], path: Path) -> tuple[object, _Machine]:
    """What one pickle ends with; the program stands behind it afterwards."""
    machine = _Machine(program, budget)
    try:
        return machine.run(), machine
    except _HostileError as exc:
        raise UnsafeError(f"the pickle {exc}", where=str(path), fix=_DISTRUST) from exc
    except _BrokenError as exc:
        raise _invalid(path, f"the pickle {exc} (byte {program.offset:,})") from exc
    except ValueError as exc:  # of int(), float() and decode(): the text of an operand
        raise _invalid(
            path, f"the pickle has an operand that cannot be read (byte {program.offset:,})"
        ) from exc


# --- zip archives ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """One file of an archive: where its bytes lie, stored as they are."""

    name: str
    header_at: int
    start: int
    nbytes: int


_EOCD = struct.Struct("<4s4H2IH")
_EOCD64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_SATURATED = 2**32 - 1
_SIZES_FOLLOW, _UTF8 = 0x0008, 0x0800


def _invalid(path: Path, what: str, fix: str = _AGAIN) -> InvalidFileError:
    return InvalidFileError(what, where=str(path), fix=fix)


def _unsafe(path: Path, what: str) -> UnsafeError:
    return UnsafeError(what, where=str(path), fix=_DISTRUST)


def _members(stream: Descriptor, size: int, path: Path) -> dict[str, _Member]:
    """The archive's files by name, if there is only one way to read it."""
    start, nbytes, count = _directory(stream, size, path)
    raw = stream.read(nbytes, start)
    members: dict[str, _Member] = {}
    position = 0
    while position < nbytes:
        member, position = _member(stream, raw, position, path)
        if member.name in members:
            raise _unsafe(path, f"the zip has {_shown(member.name)} twice")
        members[member.name] = member
    if len(members) != count:
        raise _invalid(path, f"the zip says it has {count:,} files, it has {len(members):,}")
    end = 0
    for member in sorted(members.values(), key=lambda member: member.header_at):
        if member.header_at < end:
            raise _unsafe(path, f"{_shown(member.name)} overlaps another file of the zip")
        end = member.start + member.nbytes
    if end > start:
        raise _unsafe(path, "the zip's files overlap its directory")
    return members


def _directory(stream: Descriptor, size: int, path: Path) -> tuple[int, int, int]:
    """(start, bytes, number of entries) of the central directory."""
    at = size - _EOCD.size
    tail = stream.read(_EOCD.size, at) if at >= 0 else b""
    if tail[:4] != b"PK\x05\x06":
        raise _invalid(path, "truncated: the zip's directory, which ends the file, is not there")
    _, _, _, _, count, nbytes, start, comment = _EOCD.unpack(tail)
    if comment:
        raise _invalid(path, "the zip has a comment, which torch.save does not write")
    locator = stream.read(_LOCATOR64.size, at - _LOCATOR64.size) if at >= _LOCATOR64.size else b""
    if locator[:4] == b"PK\x06\x07":
        record_at = _LOCATOR64.unpack(locator)[2]
        if record_at + _EOCD64.size > at:
            raise _invalid(path, "the zip's directory lies outside the file")
        record = _EOCD64.unpack(stream.read(_EOCD64.size, record_at))
        if record[0] != b"PK\x06\x06":
            raise _invalid(path, "the zip's directory is damaged")
        large = (record[7], record[8], record[9])
        small = zip((count, nbytes, start), large, (0xFFFF, _SATURATED, _SATURATED), strict=True)
        if any(value not in (wide, full) for value, wide, full in small):
            raise _unsafe(path, "the zip has two directories that disagree")
        (count, nbytes, start), at = large, record_at
    if start + nbytes != at:
        raise _invalid(path, "the zip's directory lies outside the file")
    if nbytes > MAX_DIRECTORY_BYTES:
        raise _unsafe(path, f"the zip's directory is larger than {MAX_DIRECTORY_BYTES >> 20} MiB")
    return start, nbytes, count


def _member(stream: Descriptor, raw: bytes, position: int, path: Path) -> tuple[_Member, int]:
    """The entry at `position` of the directory, checked against the header before its data."""
    if position + _CENTRAL.size > len(raw):
        raise _invalid(path, "the zip's directory is damaged")
    fields = _CENTRAL.unpack_from(raw, position)
    signature, flags, method = fields[0], fields[3], fields[4]
    packed, nbytes, name_bytes, extra_bytes, comment_bytes = fields[8:13]
    offset = fields[16]
    name_at = position + _CENTRAL.size
    end = name_at + name_bytes + extra_bytes + comment_bytes
    if signature != b"PK\x01\x02" or end > len(raw):
        raise _invalid(path, "the zip's directory is damaged")
    raw_name = raw[name_at : name_at + name_bytes]
    name = _member_name(raw_name, path)
    if flags & 1:
        raise _invalid(path, f"{_shown(name)} is encrypted", _SAFETENSORS)
    if flags & ~(_SIZES_FOLLOW | _UTF8):
        raise _invalid(path, f"{_shown(name)} has the unknown zip flags {flags:#x}")
    extra = raw[name_at + name_bytes : name_at + name_bytes + extra_bytes]
    nbytes, packed, offset = _zip64(extra, (nbytes, packed, offset), path)
    if method != 0 or packed != nbytes:
        raise _invalid(
            path, f"{_shown(name)} is compressed, which torch.save does not do", _SAFETENSORS
        )
    start = _data_start(stream, _Member(name, offset, 0, nbytes), raw_name, flags, path)
    return _Member(name, offset, start, nbytes), end


def _member_name(raw: bytes, path: Path) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise _invalid(path, "the zip has a name that is not UTF-8") from exc
    if name.startswith("/") or ".." in name.split("/") or any(char in name for char in "\\:\0"):
        raise _unsafe(path, f"the zip has a file that leaves its folder: {_shown(name)}")
    return name


def _zip64(extra: bytes, small: tuple[int, int, int], path: Path) -> tuple[int, int, int]:
    """Sizes and offset, the saturated ones taken from the extra field 1."""
    if _SATURATED not in small:
        return small
    while len(extra) >= 4:
        tag, size = struct.unpack_from("<2H", extra)
        if tag == 1:
            count = small.count(_SATURATED)
            if size < 8 * count or len(extra) < 4 + 8 * count:
                break
            wide = iter(struct.unpack_from(f"<{count}Q", extra, 4))
            nbytes, packed, offset = (
                next(wide) if value == _SATURATED else value for value in small
            )
            return nbytes, packed, offset
        extra = extra[4 + size :]
    raise _invalid(path, "the zip's directory is damaged")


def _data_start(
    stream: Descriptor, member: _Member, raw_name: bytes, flags: int, path: Path
) -> int:
    """Where a file's bytes begin; `InvalidFileError` or `UnsafeError` if its two headers differ."""
    size = _size_of(stream)
    if member.header_at + _LOCAL.size + len(raw_name) > size:
        raise _invalid(path, f"truncated: {_shown(member.name)} lies outside the file")
    head = stream.read(_LOCAL.size + len(raw_name), member.header_at)
    fields = _LOCAL.unpack_from(head)
    packed, nbytes, name_bytes, extra_bytes = fields[7:11]
    follow = bool(flags & _SIZES_FOLLOW) and packed == nbytes == 0
    agree = (
        fields[0] == _ZIP
        and fields[2] == flags
        and fields[3] == 0
        and name_bytes == len(raw_name)
        and head[_LOCAL.size :] == raw_name
        and (follow or {packed, nbytes} <= {member.nbytes, _SATURATED})
    )
    if not agree:
        raise _unsafe(path, f"the two headers of {_shown(member.name)} in the zip disagree")
    start: int = member.header_at + _LOCAL.size + name_bytes + extra_bytes
    if start + member.nbytes > size:
        raise _invalid(path, f"truncated: {_shown(member.name)} lies outside the file")
    return start


def _size_of(stream: Descriptor) -> int:
    """Bytes of an open file."""
    return Identity.of(stream.fileno()).size


# --- the two containers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contents:
    """What a container holds.

    root      what the pickle ends with
    places    storage key → (byte offset in the file, bytes)
    sha256    of the pickle's bytes
    unused    bytes of storages that the pickle does not name
    """

    root: object
    places: Mapping[str, tuple[int, int]]
    sha256: str
    unused: int = 0


_SMALL_MEMBERS = frozenset(
    {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
)


def _read_zip(stream: Descriptor, size: int, path: Path) -> _Contents:
    members = _members(stream, size, path)
    top = _top_folder(members, path)
    byteorder = members.get(f"{top}/byteorder")
    if byteorder is not None:
        order = stream.read(min(byteorder.nbytes, 16), byteorder.start)
        if order != b"little":
            raise _invalid(
                path, f"its numbers are {_shown(order)}-endian, not little", _SAFETENSORS
            )
    data = members[f"{top}/data.pkl"]
    program = _Program(stream, data.start, data.start + data.nbytes)
    root, machine = _execute(program, iter(range(MAX_OPCODES)), path)
    if program.position != data.nbytes:
        raise _invalid(path, f"{data.nbytes - program.position:,} bytes follow the pickle")
    prefix = f"{top}/data/"
    places = {
        name.removeprefix(prefix): (member.start, member.nbytes)
        for name, member in members.items()
        if name.startswith(prefix)
    }
    _check_storages(machine, places, path)
    unused = sum(nbytes for key, (_, nbytes) in places.items() if key not in machine.storages)
    return _Contents(root, places, hashlib.sha256(program.read_bytes).hexdigest(), unused)


def _top_folder(members: Mapping[str, _Member], path: Path) -> str:
    """The one folder that everything is in; refuses what `torch.save` does not write."""
    for name in members:
        inner = name.partition("/")[2]
        if inner == "constants.pkl" or inner.startswith("code/"):
            raise UnsafeError(
                "a TorchScript archive: a program, not weights",
                where=str(path),
                fix=f"{_SAFETENSORS}, or the state dict that it was made of",
            )
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if not pickles:
        raise _invalid(path, "a zip archive without a `data.pkl`: no PyTorch file", _UNPACK)
    if len(pickles) > 1:
        raise _unsafe(path, f"the zip has {len(pickles)} pickles, not one")
    top = pickles[0].removesuffix("/data.pkl")
    for name in members:
        inner = name.removeprefix(f"{top}/")
        key = inner.removeprefix("data/")
        usual = inner in _SMALL_MEMBERS or inner == "data.pkl" or (key != inner and key.isdigit())
        if inner == name or not usual:
            raise _unsafe(path, f"the zip has {_shown(name)}, which torch.save does not write")
    return top


def _check_storages(machine: _Machine, places: Mapping[str, tuple[int, int]], path: Path) -> None:
    for key, (_, nbytes) in machine.storages.items():
        if key not in places:
            raise _invalid(path, f"the storage {_shown(key)} is not in the file")
        if places[key][1] != nbytes:
            raise _invalid(
                path, f"the storage {_shown(key)} should have {nbytes:,} bytes, it has "
                f"{places[key][1]:,}"
            )  # fmt: skip


_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def _read_legacy(stream: Descriptor, size: int, path: Path) -> _Contents:
    """Five pickles (magic, version, system, the object, storage keys), then the storages."""
    program, budget = _Program(stream, 0, size), iter(range(MAX_OPCODES))
    magic, _ = _execute(program, budget, path)
    if type(magic) is not int or magic != _MAGIC:
        raise _invalid(path, "a Python pickle, but not one of torch.save", _SAFETENSORS)
    version, _ = _execute(program, budget, path)
    if version != _LEGACY_PROTOCOL:
        raise _invalid(path, f"of the unknown torch format {_brief(version)}", _SAFETENSORS)
    system, _ = _execute(program, budget, path)
    ends = [end for key, end in _pairs_of(system) if key == "little_endian"]
    if ends != [True]:
        raise _invalid(path, "its numbers are not little-endian", _SAFETENSORS)
    root, machine = _execute(program, budget, path)
    keys, _ = _execute(program, budget, path)
    places = _legacy_places(stream, program.offset, size, machine.storages, keys, path)
    return _Contents(root, places, hashlib.sha256(program.read_bytes).hexdigest())


def _legacy_places(
    stream: Descriptor,
    position: int,
    size: int,
    storages: Mapping[str, tuple[str, int]],
    keys: object,
    path: Path,
) -> dict[str, tuple[int, int]]:
    """Each storage: 8 bytes with its number of elements, then the elements."""
    listed = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    if not isinstance(keys, list) or sorted(listed) != sorted(storages) or len(listed) != len(keys):
        raise _invalid(path, "its list of storages does not fit its tensors")
    places: dict[str, tuple[int, int]] = {}
    for key in listed:
        dtype, nbytes = storages[key]
        if position + 8 + nbytes > size:
            raise _invalid(
                path, f"truncated: the storage {_shown(key)} needs {nbytes:,} bytes at byte "
                f"{position + 8:,}, the file has {size:,}"
            )  # fmt: skip
        count = int.from_bytes(stream.read(8, position), "little")
        if count * _ITEM_BYTES[dtype] != nbytes:
            raise _invalid(
                path, f"the storage {_shown(key)} should have {nbytes:,} bytes, it says "
                f"{count * _ITEM_BYTES[dtype]:,}"
            )  # fmt: skip
        places[key] = (position + 8, nbytes)
        position += 8 + nbytes
    if position != size:
        raise _invalid(path, f"{size - position:,} bytes follow the last storage")
    return places


# --- from an object to named tensors --------------------------------------------------------------


def _pairs_of(value: object) -> Sequence[tuple[object, object]]:
    """The items of a dict or of a ParameterDict; none for anything else."""
    if isinstance(value, _Object) and value.name == _PARAMETERS:
        state = value.state.pairs if isinstance(value.state, _Dict) else ()
        value = next((item for key, item in state if key == "_parameters"), None)
    return value.pairs if isinstance(value, _Dict) else ()


@dataclass
class _Found:
    """Tensors under their names, and what was met beside them."""

    tensors: dict[str, _Tensor] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


class _Walk:
    """Goes through objects, not further than the budget: they may be cyclic, or vast when written
    out (a list of ten times the same list of ten times the same list …)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._nodes = 0

    def tensors(self, value: object, *, aside: frozenset[str] = frozenset()) -> _Found:
        """The tensors in a dict, names joined with dots.

        aside  keys of the dict itself that are not entered
        """
        found = _Found()
        pending: list[tuple[str, object, int]] = [("", value, 0)]
        while pending:
            name, item, depth = pending.pop()
            children = self._children(item)
            self._nodes += 1 + len(children or ())
            if self._nodes > MAX_NODES or depth > MAX_DEPTH:
                raise _unsafe(self._path, "the pickle is nested too deeply, or without end")
            if isinstance(item, _Tensor):
                self._add(found, name, item)
            elif isinstance(item, _Unread):
                raise _invalid(self._path, f"{_shown(name)} is {item.kind}, which is not read",
                               _SAFETENSORS)  # fmt: skip
            elif children is None:
                found.others.append(f"{name} ({_kind(item)})")
            else:
                pending += [
                    (self._joined(name, key), child, depth + 1)
                    for key, child in reversed(children)
                    if depth or key not in aside
                ]
        return found

    def _children(self, item: object) -> Sequence[tuple[str, object]] | None:
        """Named contents of a container; None for what is none."""
        if isinstance(item, list | tuple):
            return [(str(number), child) for number, child in enumerate(item)]
        if isinstance(item, _Dict) or (isinstance(item, _Object) and item.name == _PARAMETERS):
            return [(self._key(key), child) for key, child in _pairs_of(item)]
        return None

    def _key(self, key: object) -> str:
        if type(key) is int:
            return str(key)
        return key if isinstance(key, str) else f"<{_brief(key)}>"

    def _joined(self, name: str, key: str) -> str:
        joined = f"{name}.{key}" if name else key
        if len(joined) > _MAX_NAME:
            raise _invalid(self._path, f"the name {_shown(joined)} is longer than {_MAX_NAME}")
        return joined

    def _add(self, found: _Found, name: str, tensor: _Tensor) -> None:
        if name in found.tensors:
            raise _invalid(self._path, f"{_shown(name)} is there twice")
        if tensor.problem or tensor.dtype not in _SPEC_DTYPES:
            kind = tensor.problem or f"of {tensor.dtype}"
            raise _invalid(self._path, f"{_shown(name)} is {kind}, which is not read", _SAFETENSORS)
        if not _is_text(name):
            raise _invalid(self._path, f"lone surrogate in {_shown(name)}")
        found.tensors[name] = tensor


def _kind(value: object) -> str:
    if isinstance(value, _Global | _Object):
        return ".".join(value.name)
    return "nothing" if value is None else type(value).__name__.strip("_").lower()


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _listed(words: Sequence[str]) -> str:
    shown = ", ".join(_shown(word) for word in words[:_MOST_LISTED])
    return shown + (f" and {len(words) - _MOST_LISTED:,} more" if len(words) > _MOST_LISTED else "")


def _state_dict(root: object, path: Path) -> tuple[_Found, list[str]]:
    """The weights of a file, and warnings that name what is left out."""
    if not isinstance(root, _Dict):
        raise _invalid(
            path, f"the pickle holds {_brief(root)}, not a dict of tensors", _SAFETENSORS
        )
    walk = _Walk(path)
    items = {key: value for key, value in root.pairs if isinstance(key, str)}
    wrappers: tuple[str, ...] = (_ALWAYS_WRAPPER,)
    if not any(isinstance(value, _Tensor) for value in items.values()):
        wrappers += _WRAPPERS
    for key in wrappers:
        found = walk.tensors(items[key]) if _pairs_of(items.get(key)) else _Found()
        if found.tensors:
            rest = [other for other in items if other != key]
            break
    else:
        found = walk.tensors(root, aside=_ASIDE)
        rest = [key for key in items if key in _ASIDE]
    if not found.tensors:
        raise _invalid(path, "the pickle holds no tensors", "give a file of weights")
    warnings = []
    left = [key for key in rest if key not in _METADATA_KEYS]
    if left:
        warnings.append(f"left out, beside the weights: {_listed(left)}")
    others = [name for name in found.others if name.partition(" ")[0] not in _METADATA_KEYS]
    if others:
        warnings.append(f"left out, for they are no tensors: {_listed(others)}")
    return found, warnings


def _metadata(root: object) -> dict[str, str]:
    """Steps and names that stand beside the weights, as text."""
    found = {}
    for key, value in _pairs_of(root):
        if isinstance(key, str) and key in _METADATA_KEYS and isinstance(value, str | int | float):
            text = str(value)
            if len(text) <= _MAX_NAME and _is_text(text):
                found[key] = text
    return found


def _shared(tensors: Mapping[str, _Tensor]) -> list[str]:
    """A warning that names tensors which show the same bytes."""
    spans = sorted(
        (tensor.storage.key, *tensor.span, name)
        for name, tensor in tensors.items()
        if tensor.nbytes
    )
    groups: list[list[str]] = []
    reach = 0
    for number, (key, start, end, name) in enumerate(spans):
        if number and key == spans[number - 1][0] and start < reach:
            groups[-1].append(name)
            reach = max(reach, end)
        else:
            groups.append([name])
            reach = end
    shared = [group for group in groups if len(group) > 1]
    if not shared:
        return []
    examples = "; ".join(_listed(group) for group in shared[:_MOST_LISTED])
    more = f"; and {len(shared) - _MOST_LISTED:,} more groups" if len(shared) > _MOST_LISTED else ""
    return [f"stored once, read as tensors of their own: {examples}{more}"]


def _extent(tensor: _Tensor, storage_at: int) -> Extent:
    """Where a tensor's elements lie; dims that follow one another in memory are one run."""
    if not tensor.nbytes:
        return Extent(0, storage_at, 0)
    runs: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape, tensor.strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    in_order = not runs or (len(runs) == 1 and runs[0][1] == 1)
    start = storage_at + tensor.span[0]
    return Extent(0, start, tensor.nbytes, () if in_order else tuple(runs))


# --- the door -------------------------------------------------------------------------------------


def is_pickle(path: Path) -> bool:
    """Whether a file begins as those that `torch.save` wrote, now or ever (zip, pickle, tar).

    Looks at the bytes, not at the name. False for what is no file; opening it tells why.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
    except (OSError, ValueError):
        return False
    with open_file(path) as stream:
        head = stream.read(min(_size_of(stream), _SNIFF_BYTES), 0)
    if head[8:9] == b"{":  # a safetensors header, whose length may look like anything
        return False
    return head.startswith((_ZIP, *_PROTOCOLS)) or _is_tar(head)


def _is_tar(head: bytes) -> bool:
    at, mark = _TAR
    return head[at : at + len(mark)] == mark


def open_pickle(path: Path) -> Checkpoint:
    """A file of `torch.save` as a checkpoint; nothing in it is run, no values are read.

    Tensors are found in the outermost dict, or in its `state_dict`, `params_ema`, `params`,
    `model_state_dict`, `model` or `module`; nested dicts and lists give names joined with dots.
    What is left out is in the checkpoint's warnings.

    Raises `UnsafeError` for a file that holds code or that is made to mislead or exhaust its
    reader, `InvalidFileError` for one that is damaged or of a kind that is not read.
    """
    with open_file(path) as stream:
        identity = Identity.of(stream.fileno())
        size = identity.size
        head = stream.read(min(size, _SNIFF_BYTES), 0)
        if _is_tar(head):
            raise _invalid(
                path, "a tar archive, which is not read (torch before 0.1.10 wrote models so)",
                "unpack it, if it holds a model; do not load it with torch, tar files can run code",
            )  # fmt: skip
        read = _read_zip if head.startswith(_ZIP) else _read_legacy
        contents = read(stream, size, path)
    found, warnings = _state_dict(contents.root, path)
    tensors = found.tensors
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > MAX_EXPANSION * size + _FREE_BYTES:
        raise _unsafe(path, f"a bomb: a file of {size:,} bytes with tensors of {total:,}")
    if contents.unused:
        warnings.append(f"{contents.unused:,} bytes of the file belong to no tensor")
    specs = {
        name: TensorSpec(name, _SPEC_DTYPES[tensor.dtype], tensor.shape)
        for name, tensor in tensors.items()
    }
    extents = {
        name: (_extent(tensor, contents.places[tensor.storage.key][0]),)
        for name, tensor in tensors.items()
    }
    header = Header(
        specs=MappingProxyType(specs),
        starts=MappingProxyType({name: runs[0].start for name, runs in extents.items()}),
        metadata=MappingProxyType(_metadata(contents.root)),
        data_start=min(start for start, _ in contents.places.values()),
        file_bytes=size,
        sha256=contents.sha256,
        warnings=(*warnings, *_shared(tensors)),
    )
    return Checkpoint(path, [SourceFile(path, header, identity)], tensors=Tensors(specs, extents))
