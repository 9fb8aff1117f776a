"""What programs may ask for, in torch: methods, adapters, whole tensors, any dtype.

`plain` does the same for linear formulas without it. Knows programs and how to read, no files.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ckptools.codec import count_nonfinite
from ckptools.lora.bake import bake_module, by_module, delta_elements
from ckptools.methods import load_methods
from ckptools.native import KERNELS, LOAD, Formula, Step
from ckptools.plain import PlainEvaluator, mixes_plainly
from ckptools.program import (
    Apply,
    Bake,
    Change,
    Compute,
    Mix,
    Node,
    Precision,
    Read,
    Widen,
    applied_in,
)
from ckptools.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# Elements of a block: every operand stays near the second-level cache, and few calls are made.
BLOCK = 1 << 17

Parts = tuple[tuple[str, Read], ...]


class NonFiniteInputError(ValueError):
    """A method with comparisons was about to get a NaN or an Inf, which it could swallow."""


class Reader(Protocol):
    """How to get a tensor's bytes."""

    def __call__(self, read: Read, begin: int, view: memoryview, /) -> None:
        """Fill `view` with the tensor's elements from `begin` on."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name that has one."""
    found = getattr(torch, DTYPES[name].torch_name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} has no torch dtype")
    return found


# the dtypes of floats, as safetensors calls them
_STORED = {torch_dtype(name): name for name, dtype in DTYPES.items() if dtype.is_float}
_ROUND = Formula([Step(LOAD, 0, read=0)], ["F64"])  # what `store` asks of the kernels


def as_tensor(data: NDArray[np.uint8], dtype: str) -> Tensor:
    """Bytes seen as a flat tensor of `dtype`, without copying."""
    if not data.size:
        return torch.empty(0, dtype=torch_dtype(dtype))
    width = DTYPES[dtype].bits // 8
    if data.ctypes.data % width:  # only where a tensor lies unaligned in a shared run of bytes
        raise ValueError("unaligned bytes")
    return torch.frombuffer(data.data, dtype=torch_dtype(dtype))


class Memory:
    """One worker's memory: a stack of blocks to compute in.

    parts  of the adapter modules that go into the tensor that was worked on last
    """

    def __init__(self) -> None:
        self.parts: dict[Parts, dict[str, Tensor]] = {}
        self.plain = PlainEvaluator()
        self._spec: TensorSpec | None = None
        self._blocks: dict[torch.dtype, list[Tensor]] = {}

    def block(self, depth: int, dtype: torch.dtype, length: int) -> Tensor:
        """The `depth`-th block of the stack; contents undefined."""
        blocks = self._blocks.setdefault(dtype, [])
        while len(blocks) <= depth:
            blocks.append(torch.empty(BLOCK, dtype=dtype))
        return blocks[depth] if length == BLOCK else blocks[depth][:length]

    def turn_to(self, spec: TensorSpec) -> None:
        """Give back the adapter's parts if they were another tensor's."""
        if self._spec is not spec:
            self._spec, self.parts = spec, {}


# --- arithmetic --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ElementRandom:
    """Random numbers addressed by (seed, tensor name, stream, element): see `Random`.

    Philox 4x64 gives 4 numbers per counter step, so a block may start at any multiple of 4.
    Source: Salmon et al. 2011, 'Parallel random numbers: as easy as 1, 2, 3'; numpy's `Philox`.
    """

    seed: int
    tensor: str
    begin: int
    shape: tuple[int, ...]

    def uniform(self, stream: int) -> Tensor:
        """Numbers in [0, 1), float64, of `shape`, from element `begin` of the tensor on."""
        name = hashlib.sha256(self.tensor.encode()).digest()
        key = [
            self.seed % 2**64,
            int.from_bytes(name[:8], "little") ^ zlib.crc32(str(stream).encode()),
        ]
        skip, length = self.begin % 4, math.prod(self.shape)
        generator = np.random.Generator(
            np.random.Philox(key=np.array(key, np.uint64), counter=self.begin // 4)
        )
        return torch.from_numpy(generator.random(skip + length)[skip:]).view(self.shape)


class Evaluator:
    """Evaluates a mix over flat inputs of equal length, into scratch blocks."""

    def __init__(
        self,
        memory: Memory,
        dtype: torch.dtype,
        random: Callable[[int, tuple[int, ...]], ElementRandom],
    ) -> None:
        self._memory, self._dtype, self._random = memory, dtype, random

    def block(self, mix: Mix, inputs: Sequence[Tensor], begin: int) -> Tensor:
        """The mix of one block; `begin` is the block's first element within its tensor."""
        return self._mix(mix, inputs, begin, 0)

    def _mix(self, mix: Mix, inputs: Sequence[Tensor], begin: int, depth: int) -> Tensor:
        (first, node), *rest = mix.terms
        total = self._node(node, inputs, begin, depth)
        if first != 1.0:
            total.mul_(first)
        for factor, node in rest:
            term = self._node(node, inputs, begin, depth + 1)
            if factor == 1.0:
                total.add_(term)
            elif factor == -1.0:
                total.sub_(term)
            else:  # never add_(term, alpha=factor): it is fused on some processors
                total.add_(term.mul_(factor))
        return total

    def _node(self, node: Node, inputs: Sequence[Tensor], begin: int, depth: int) -> Tensor:
        """The value of a node, in the block at `depth`."""
        if isinstance(node, int):
            target = self._memory.block(depth, self._dtype, len(inputs[0]))
            return target.copy_(inputs[node])
        if isinstance(node, Mix):
            return self._mix(node, inputs, begin, depth)
        if isinstance(node, Bake):
            raise TypeError("adapters that depend on the weight need the whole of it")
        models = [
            self._mix(model, inputs, begin, depth + 1 + number)
            for number, model in enumerate(node.models)
        ]
        result = call_method(node, models, self._random(begin, (len(inputs[0]),)))
        target = self._memory.block(depth, self._dtype, len(inputs[0]))
        return target.copy_(result)


@dataclass(frozen=True)
class WholeEvaluator:
    """Evaluates a mix over whole tensors of one shape; allocates what it needs.

    bake  makes an adapter's changes to a tensor that it may change in place
    """

    dtype: torch.dtype
    random: ElementRandom
    bake: Callable[[Bake, Tensor], Tensor]

    def mix(self, mix: Mix, inputs: Sequence[Tensor]) -> Tensor:
        """The mix of the inputs, shape kept."""
        total: Tensor | None = None
        for factor, node in mix.terms:
            term = self._node(node, inputs)
            if factor != 1.0:
                term.mul_(factor)
            total = term if total is None else total.add_(term)
        if total is None:
            raise ValueError("a mix without terms")
        return total

    def _node(self, node: Node, inputs: Sequence[Tensor]) -> Tensor:
        """The value of a node in memory that the caller may change."""
        match node:
            case int():
                return inputs[node].to(self.dtype, copy=True)
            case Mix():
                return self.mix(node, inputs)
            case Bake(model=model):
                return self.bake(node, self.mix(model, inputs))
            case Apply(models=nodes):
                models = [self.mix(model, inputs) for model in nodes]
                result = call_method(node, models, self.random)
                shared = any(result is model for model in models)
                return result.to(self.dtype, copy=True) if shared else result.to(self.dtype)


def call_method(node: Apply, models: Sequence[Tensor], random: ElementRandom) -> Tensor:
    """Call a registered method with its models in calling order."""
    method = load_methods()[node.method]
    count = len(models) - len(method.keyword_models)
    keywords: dict[str, Any] = dict(zip(method.keyword_models, models[count:], strict=True))
    if method.random:
        keywords["rng"] = random
    result: Tensor = method.function(*models[:count], **keywords, **dict(node.scalars))
    return result


def store(values: Tensor, target: Tensor) -> None:
    """Round values to the target's dtype; what is too large becomes NaN or Inf.

    values  contiguous, as `target` is
    Rounded once: torch takes fp64 to narrower dtypes by way of fp32, and a number that fp32 rounds
    to the middle between two may then go to the wrong one.
    Since 2.12 torch turns even Inf into 448 for float8_e4m3fn. Beyond 464 the nearest number of
    that format is no longer 448. Source: https://github.com/pytorch/pytorch/pull/178817.
    """
    if values.dtype == torch.float64 and target.element_size() == 2 and KERNELS is not None:
        data, out = _bytes_of(values), _bytes_of(target)
        KERNELS.mix(_ROUND, [data], _STORED[target.dtype], out, KERNELS.memory(_ROUND.depth))
        return
    if values.dtype == torch.float64 and target.element_size() < 4:
        flat, room = values.reshape(-1), target.view(-1)
        for low in range(0, len(flat), BLOCK):
            store(_to_odd(flat[low : low + BLOCK]), room[low : low + BLOCK])
        return
    if target.dtype == torch.float8_e4m3fn and values.dtype != target.dtype:
        wide = values.float() if values.element_size() == 1 else values
        values = torch.where(wide.abs() > 464.0, math.nan, wide)
    target.copy_(values)
    if target.element_size() == 2 and _has_nonfinite(target):  # every NaN alike, as in the kernels
        target.masked_fill_(target.isnan(), math.nan)


def _has_nonfinite(values: Tensor) -> bool:
    """Whether any is NaN or Inf; of halves torch's own look takes ten times as long."""
    return bool(count_nonfinite(_bytes_of(values), _STORED[values.dtype]))


def _bytes_of(values: Tensor) -> NDArray[np.uint8]:
    """What a contiguous tensor holds, without copying."""
    return values.view(-1).view(torch.uint8).numpy()


def _to_odd(values: Tensor) -> Tensor:
    """Fp64 as fp32 whose last bit says "not exact": rounded from there is as if from fp64.

    Source: Boldo and Melquiond 2008, 'Emulation of FMA and correctly rounded sums: proved
    algorithms using rounding to odd', section 3.
    """
    nearest = values.float()
    back = nearest.double()
    bits = nearest.view(torch.int32) - (back.abs() > values.abs()).int()
    inexact = (back < values) | (back > values)  # neither for NaN
    return (bits | inexact.int()).view(torch.float32)


# --- programs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Runs programs for one engine.

    read          gets bytes
    seed          of methods that draw random numbers
    check_inputs  whether methods may be given NaN and Inf; if not, `NonFiniteInputError`
    """

    read: Reader
    seed: int
    check_inputs: bool

    def fill(
        self,
        spec: TensorSpec,
        program: Compute,
        inputs: Sequence[NDArray[np.uint8]],
        *,
        begin: int,
        out: NDArray[np.uint8],
        memory: Memory,
    ) -> bool:
        """Make the elements of `spec` from `begin` on in `out`; the inputs hold as many.

        Returns whether they are known to be finite.
        """
        length = out.size * 8 // DTYPES[spec.dtype].bits
        reads = zip(inputs, program.reads, strict=True)
        tensors = [as_tensor(data, read.spec.dtype) for data, read in reads]
        memory.turn_to(spec)
        for changes in program.deltas:
            parts = [self._parts(change, program.precision, memory) for change in changes]
            tensors.append(delta_elements(changes, parts, spec.shape, begin, begin + length))
        if mixes_plainly(program, spec.dtype):
            dtype = torch_dtype(program.precision)
            added = [_bytes_of(delta.to(dtype)) for delta in tensors[len(inputs) :]]
            return memory.plain.fill(program, [*inputs, *added], spec.dtype, out)
        if any(True for _ in applied_in(program.mix)):
            self._look_at(tensors)
        result = as_tensor(out, spec.dtype)
        if program.mix.terms == ((1.0, 0),):
            store(tensors[0], result)
            return False
        precision: Precision = "F64" if program.is_linear else program.precision
        evaluator = Evaluator(memory, torch_dtype(precision), self._random(spec))
        for low in range(0, length, BLOCK):
            high = min(low + BLOCK, length)
            block = [tensor[low:high] for tensor in tensors]
            store(evaluator.block(program.mix, block, begin + low), result[low:high])
        return False

    def fill_whole(
        self, spec: TensorSpec, program: Compute | Widen, out: NDArray[np.uint8]
    ) -> None:
        """Make a whole tensor in `out`."""
        result = as_tensor(out, spec.dtype).view(spec.shape)
        if isinstance(program, Compute):
            store(self._whole(spec, program, None).view(spec.shape), result)
            return
        channels, common = program.channels, program.common
        wide = self._load(program.extra).to(torch_dtype(common.precision))
        wide[:, :channels] = self._whole(spec, common, channels)
        for weight, changes in program.deltas:
            parts = [self._parts(change, common.precision) for change in changes]
            delta = delta_elements(changes, parts, spec.shape, 0, wide.numel()).view(spec.shape)
            wide += delta * weight
        store(wide, result)

    def _whole(self, spec: TensorSpec, program: Compute, channels: int | None) -> Tensor:
        inputs = [self._load(read) for read in program.reads]
        if channels is not None:
            inputs = [tensor[:, :channels].contiguous() for tensor in inputs]
        else:
            inputs = [tensor.reshape(spec.shape) for tensor in inputs]
        shape = tuple(inputs[0].shape)
        for changes in program.deltas:
            parts = [self._parts(change, program.precision) for change in changes]
            delta = delta_elements(changes, parts, shape, 0, inputs[0].numel())
            inputs.append(delta.view(shape))
        has_methods = any(True for _ in applied_in(program.mix))
        if has_methods:
            self._look_at(inputs)

        def bake(node: Bake, weight: Tensor) -> Tensor:
            for changes in by_module(node.changes):
                parts = self._parts(changes[0], program.precision)
                bake_module(changes, parts, weight, node.strength)
            if has_methods:
                self._look_at([weight])
            return weight

        random = self._random(spec)(0, shape)
        evaluator = WholeEvaluator(torch_dtype(program.precision), random, bake)
        return evaluator.mix(program.mix, inputs)

    def _random(self, spec: TensorSpec) -> Callable[[int, tuple[int, ...]], ElementRandom]:
        return lambda begin, shape: ElementRandom(self.seed, spec.name, begin, shape)

    def _parts(
        self, change: Change, precision: Precision, memory: Memory | None = None
    ) -> dict[str, Tensor]:
        """A module's tensors, floats in the precision of the arithmetic.

        Kept in the memory while one tensor is worked on: its pieces share them.
        """
        if memory is not None and change.parts in memory.parts:
            return memory.parts[change.parts]
        parts = {}
        for part, read in change.parts:
            values = self._load(read)
            if read.spec.is_float:  # copied even so: matrix products depend on the alignment
                values = values.to(torch_dtype(precision), copy=True)
            parts[part] = values
        if memory is not None:
            memory.parts[change.parts] = parts
        return parts

    def _load(self, read: Read) -> Tensor:
        data = np.empty(read.spec.nbytes, np.uint8)
        self.read(read, 0, data.data)
        return as_tensor(data, read.spec.dtype).view(read.spec.shape)

    def _look_at(self, inputs: Sequence[Tensor]) -> None:
        """Methods with comparisons can swallow a NaN, so theirs are looked for beforehand."""
        if not self.check_inputs:
            return
        if any(map(_has_nonfinite, inputs)):
            raise NonFiniteInputError


@contextmanager
def single_threaded() -> Iterator[None]:
    """Torch without threads of its own: blocks are too small to share, workers share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
