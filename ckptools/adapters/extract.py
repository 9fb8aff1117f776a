"""`lora extract`: the adapter that takes one model to another, one weight at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ckptools.adapters.factors import Budget, decompose
from ckptools.adapters.reading import Model, bias_of, open_model, values_of
from ckptools.adapters.writing import SCHEMES, AdapterWriter, Names, Written, check_output
from ckptools.errors import InputError, NonFiniteError, UsageError, counted
from ckptools.lora.names import Target
from ckptools.progress import Progress
from ckptools.quantised import not_numbers, quantised_in

if TYPE_CHECKING:
    from torch import Tensor

# Tables of vectors: trainers put no LoRA on them, and most programs would not load one.
_EMBEDDINGS = (
    "token_embedding", "position_embedding", "positional_embedding", "class_embedding",
    "embed_tokens", "shared", "relative_attention_bias", "pos_embed",
)  # fmt: skip


@dataclass
class Residual:
    """What an extracted adapter misses of the difference, as sums of squares.

    total   ‖B - A‖²; missed: ‖B - A - ΔW‖², what is left out included; left_out: of it
    """

    total: float = 0.0
    missed: float = 0.0
    left_out: float = 0.0

    @property
    def relative(self) -> float:
        """‖B - A - ΔW‖ / ‖B - A‖."""
        return math.sqrt(self.missed / self.total) if self.total else 0.0

    @property
    def left_out_share(self) -> float:
        """‖what is left out‖² / ‖B - A‖²: its share of the change."""
        return self.left_out / self.total if self.total else 0.0

    def add(self, total: float, missed: float, *, left_out: bool = False) -> None:
        """Add one tensor's squares."""
        self.total += total
        self.missed += missed
        self.left_out += missed if left_out else 0.0


@dataclass(frozen=True)
class LeftOut:
    """A changed tensor that the adapter does not hold; share: of ‖B - A‖²."""

    tensor: str
    reason: str
    share: float


@dataclass(frozen=True)
class Extraction:
    """What an extraction did.

    residual   over everything that differs; blocks: by block
    left_out   changed tensors that are not in the adapter, the largest first
    unchanged  modules that are equal in both models
    """

    written: Written
    family: str
    residual: Residual
    blocks: Mapping[str, Residual]
    left_out: tuple[LeftOut, ...]
    unchanged: int
    notes: tuple[str, ...]


def extract(
    first: Path,
    second: Path,
    output: Path,
    *,
    budget: Budget,
    names: Names = "kohya",
    dtype: str = "fp16",
    with_diff: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Write the adapter that, baked into `first` at weight 1, gives `second` or what is near it.

    with_diff  hold what is not of low rank (norms, biases, embeddings) as whole differences
    Linear layers and convolutions get factors of U sqrt(S), sqrt(S) Vᵀ, alpha = rank. The residual
    is measured against the factors as stored.
    """
    if with_diff and names == "peft":
        raise UsageError(
            "PEFT has no names for whole differences", fix="use --names kohya with --with-diff"
        )
    check_output(output, [first, second], force=force)
    with (
        open_model(first) as a,
        open_model(second) as b,
        AdapterWriter(output, names=names, dtype=dtype, replaces=force) as writer,
    ):
        _check_pair(a, b)
        run = _Run(a, b, writer, budget, with_diff, progress or Progress())
        run.walk()
        if not run.residual.total:
            raise InputError(
                "the two models hold the same weights: there is nothing to extract",
                where=str(second),
            )
        if not run.added:
            raise InputError(
                "the models differ only in what a LoRA cannot hold",
                where=str(second),
                fix="use --with-diff",
            )
        written = writer.finish(_metadata(a, b), family=a.family.id)
    total = run.residual.total
    return Extraction(
        written=written,
        family=a.family.id,
        residual=run.residual,
        blocks={label: run.blocks[label] for label in sorted(run.blocks, key=a.block_order)},
        left_out=tuple(
            LeftOut(tensor, reason, square / total)
            for square, tensor, reason in sorted(run.left_out, key=lambda item: -item[0])
        ),
        unchanged=run.unchanged,
        notes=tuple(run.notes),
    )


def _check_pair(a: Model, b: Model) -> None:
    if a.family.id != b.family.id:
        raise InputError(
            f"the models are of different families: {a.family.id} and {b.family.id}",
            where=str(b.path),
            fix="give two models of one family",
        )
    for model in (a, b):
        stored = quantised_in(model.checkpoint)
        if stored:
            raise not_numbers(stored).at(str(model.path))


def _metadata(a: Model, b: Model) -> dict[str, str]:
    architecture = a.family.architecture(None)
    return {
        "modelspec.architecture": f"{architecture}/lora" if architecture else "unknown",
        "modelspec.description": f"extracted: {a.path.stem} to {b.path.stem}",
        "ss_sd_model_name": a.path.name,
    }


@dataclass
class _Run:
    """One walk over the modules of two models."""

    a: Model
    b: Model
    writer: AdapterWriter
    budget: Budget
    with_diff: bool
    progress: Progress
    residual: Residual = field(default_factory=Residual)
    blocks: dict[str, Residual] = field(default_factory=dict)
    left_out: list[tuple[float, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unchanged: int = 0
    added: int = 0
    _held: tuple[str, Tensor | None] = ("", None)

    def walk(self) -> None:
        """Every module of the naming scheme, then what has no name in it."""
        modules = self.a.names.names(SCHEMES[self.writer.names])
        self.progress.start("extracting", sum(spec.nbytes for spec in self.a.specs.values()))
        named: set[str] = set()
        for module, targets in modules.items():
            if targets[0].component == "vae":
                continue  # no trainer makes LoRAs of VAEs, no program loads them
            tensors = {t.tensor for t in targets} | {t.bias for t in targets if t.bias}
            if all(self._comparable(tensor) for tensor in tensors):
                self._module(module, targets)
                self.progress.advance(
                    sum(self.a.specs[tensor].nbytes for tensor in tensors - named)
                )
                named |= tensors
        for name in self.a.specs:
            if name not in named:
                self._unnamed(name)
                self.progress.advance(self.a.specs[name].nbytes)
        extra = [name for name in self.b.specs if name not in self.a.specs]
        if extra:
            self.notes.append(
                f"{counted(len(extra), 'tensor', 'is')} in B only, such as {extra[0]}"
            )

    def _comparable(self, name: str) -> bool:
        one, other = self.a.specs[name], self.b.specs.get(name)
        return other is not None and one.shape == other.shape and one.is_float and other.is_float

    def _difference(self, name: str) -> Tensor:
        """B - A of one tensor, kept while its rows are worked on."""
        held, values = self._held
        if held != name or values is None:
            import torch

            values = self.b.load(name) - self.a.load(name)
            if not bool(torch.isfinite(values).all()):
                raise NonFiniteError("B - A holds NaN or Inf", where=name)
            self._held = (name, values)
        return values

    def _module(self, module: str, targets: tuple[Target, ...]) -> None:
        weights = {t.tensor: self._difference(t.tensor) for t in targets}
        delta = values_of(targets, weights)
        bias = None
        if targets[0].bias:
            bias = bias_of(targets, {t.bias: self._difference(t.bias) for t in targets})
        parts: dict[str, Tensor] = {}
        rank: int | None = None
        changed = bool(delta.any())
        is_protected = self.a.family.is_protected(targets[0].tensor)
        if is_protected:  # a merge carries it, whatever adapters say
            bias = None
        elif changed and _takes_low_rank(targets[0]):
            up, down = decompose(delta.flatten(1), self.budget, name=module)
            rank = up.shape[1]
            ones = (1,) * (delta.dim() - 2)
            parts = {
                "up": up.reshape(*up.shape, *ones),
                "down": down.reshape(rank, *delta.shape[1:]),
            }
        elif changed and self.with_diff:
            parts = {"diff": delta}
        if self.with_diff and bias is not None and bool(bias.any()):
            parts["diff_b"] = bias
        stored = self.writer.add(module, parts, rank=rank) if parts else {}
        self.added += bool(parts)
        self.unchanged += not changed and (bias is None or not bool(bias.any()))
        why = "an embedding" if len(delta.shape) > 1 else "a vector"
        why = "part of what the model is" if is_protected else why
        self._account(targets[0].tensor, delta, _weight_change(stored, delta), why)
        if bias is not None:
            self._account(targets[0].bias, bias, stored.get("diff_b"), "a bias")

    def _account(self, tensor: str, delta: Tensor, held: Tensor | None, why: str) -> None:
        total = float(delta.double().square().sum())
        missed = total
        if held is not None:
            missed = float((delta.double() - held.double()).square().sum())
        elif total:
            self.left_out.append((total, tensor, why))
        left_out = held is None
        self.residual.add(total, missed, left_out=left_out)
        block = self.blocks.setdefault(self.a.block_of(tensor), Residual())
        block.add(total, missed, left_out=left_out)

    def _unnamed(self, name: str) -> None:
        """A tensor that adapters have no name for, or that the two models hold differently."""
        if not self.a.specs[name].is_float:
            return
        if name not in self.b.specs:
            self.notes.append(f"{name} is in A only")
        elif not self._comparable(name):
            one, other = self.a.specs[name], self.b.specs[name]
            self.notes.append(f"{name} is {one} in A, {other} in B: left out")
        else:
            component = self.a.family.component_of(name)
            why = "no LoRA is for a VAE" if component == "vae" else "has no name in adapters"
            self._account(name, self._difference(name), None, why)


def _takes_low_rank(target: Target) -> bool:
    return len(target.shape) > 1 and target.module.rpartition(".")[2] not in _EMBEDDINGS


def _weight_change(stored: Mapping[str, Tensor], delta: Tensor) -> Tensor | None:
    """What the parts, as stored, add to the weight."""
    if "diff" in stored:
        return stored["diff"]
    if "up" not in stored:
        return None
    product = stored["up"].flatten(1).to(delta.dtype) @ stored["down"].flatten(1).to(delta.dtype)
    return product.reshape(delta.shape)
