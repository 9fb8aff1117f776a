"""The engine without files: formulas over tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptools.engine import Outcome, Settings, Sink, Task, run
from ckptools.formula import Scope, base_model, parse_formula, specialise
from ckptools.methods import load_methods
from ckptools.plan import _precision
from ckptools.program import Compute, Program, Read, applied_in, compile_mix
from ckptools.tensors import DTYPES, TensorSpec, file_order

Tensors = Mapping[str, Tensor]
NAMES = {getattr(torch, row.torch_name): row.name for row in DTYPES.values() if row.torch_name}


@dataclass(frozen=True)
class MemorySource:
    """Tensors' bytes by name."""

    tensors: Mapping[str, bytes]

    def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
        view[:] = self.tensors[name][offset : offset + len(view)]


class MemorySink:
    """A file in memory; bytes that nobody wrote are 0xEE."""

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(b"\xee" * nbytes)

    def write(self, data: memoryview, offset: int) -> None:
        assert 0 <= offset <= offset + len(data) <= len(self.data)
        self.data[offset : offset + len(data)] = data


def spec_of(name: str, tensor: Tensor, dtype: str = "") -> TensorSpec:
    return TensorSpec(name, dtype or NAMES[tensor.dtype], tuple(tensor.shape))


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_of(data: bytes | bytearray, spec: TensorSpec) -> Tensor:
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=getattr(torch, DTYPES[spec.dtype].torch_name))
    flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, DTYPES[spec.dtype].torch_name))
    return flat.view(spec.shape)


def program_of(
    text: str, reads: Mapping[str, Read], spec: TensorSpec, params: Mapping[str, float]
) -> Compute:
    """The program of a formula over one tensor of each model, as the planner makes it."""
    scope = Scope(frozenset(reads), frozenset(params), {}, load_methods())
    formula = parse_formula(text)
    form = specialise(formula, scope, params)
    used = list(form.models)
    index = {name: number for number, name in enumerate(used)}
    mix = compile_mix(form, index, base_model(formula, scope))
    whole = any(load_methods()[node.method].access == "tensor" for node in applied_in(mix))
    chosen = tuple(reads[name] for name in used)
    return Compute(mix, chosen, _precision(spec, chosen, form, mix), whole)


def tasks_in_order(programs: Mapping[TensorSpec, Program]) -> list[Task]:
    """Tasks one after another from byte 0 on, in file order."""
    tasks, start = [], 0
    for spec in sorted(programs, key=file_order):
        tasks.append(Task(spec, programs[spec], start))
        start += spec.nbytes
    return tasks


@dataclass(frozen=True)
class Merged:
    """What came out: the tensors, all bytes in file order, and the engine's findings."""

    tensors: dict[str, Tensor]
    data: bytes
    outcome: Outcome


def run_programs(
    programs: Mapping[TensorSpec, Program],
    models: Mapping[str, Tensors],
    *,
    settings: Settings | None = None,
    sink: Sink | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Merged:
    """Run programs whose reads name `models` by position."""
    tasks = tasks_in_order(programs)
    own = MemorySink(sum(task.spec.nbytes for task in tasks))
    outcome = run(
        tasks,
        sources=[
            MemorySource({name: bytes_of(tensor) for name, tensor in tensors.items()})
            for tensors in models.values()
        ],
        labels=list(models),
        sink=sink or own,
        settings=settings or Settings(threads=2),
        progress=progress,
    )
    tensors = {
        task.spec.name: tensor_of(own.data[task.start : task.start + task.spec.nbytes], task.spec)
        for task in tasks
    }
    return Merged(tensors, bytes(own.data), outcome)


def merge_tensors(
    text: str,
    models: Mapping[str, Tensors],
    *,
    dtype: str = "",
    params: Mapping[str, float] | None = None,
    settings: Settings | None = None,
    sink: Sink | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Merged:
    """A formula over every tensor of the first model, stored as `dtype` (default: as it is)."""
    programs: dict[TensorSpec, Program] = {}
    for name, tensor in next(iter(models.values())).items():
        spec = spec_of(name, tensor, dtype)
        reads = {
            model: Read(number, name, spec_of(name, tensors[name]))
            for number, (model, tensors) in enumerate(models.items())
        }
        programs[spec] = program_of(text, reads, spec, params or {})
    return run_programs(programs, models, settings=settings, sink=sink, progress=progress)


def merge_one(text: str, dtype: str = "", **models: Tensor) -> Tensor:
    """A formula over one tensor of each model."""
    merged = merge_tensors(text, {name: {"w": t} for name, t in models.items()}, dtype=dtype)
    return merged.tensors["w"]
