"""Adapter files written module by module: tensors go to a spool on disk, the file comes at the end.

Memory holds one module at a time, whatever the ranks turn out to be. Knows kohya's and PEFT's names
of parts and of metadata; no mathematics.

Sources: kohya sd-scripts 48d368f `networks/lora.py` (save_weights), `networks/resize_lora.py` (the
word "Dynamic"); PEFT 0.21 `utils/save_and_load.py`; diffusers 0.42 `loaders/lora_base.py`
(_save_lora_as_safetensors: `lora_adapter_metadata`); ModelSpec 1.0.1.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Literal, Self

from ckptools.checkpoint import Checkpoint
from ckptools.errors import InputError, NonFiniteError, OutputError, raise_all
from ckptools.filetypes import as_safetensors
from ckptools.lora.group import CONFIG_KEY, PEFT_CONFIG
from ckptools.lora.names import Scheme
from ckptools.placement import Place, folder_problems
from ckptools.tensors import RECIPE_DTYPES, TensorSpec, file_order
from ckptools.writer import (
    PartFile,
    lay_out,
    made_folder,
    manifest_path,
    output_error,
    sync_folder,
)

if TYPE_CHECKING:
    from torch import Tensor

Names = Literal["kohya", "peft"]
DTYPES = ("fp32", "fp16", "bf16")

SCHEMES: Mapping[Names, Scheme] = {"kohya": "kohya", "peft": "diffusers"}

_CHUNK = 1 << 20
_SUFFIXES: Mapping[Names, Mapping[str, str]] = {
    "kohya": {
        "up": "lora_up.weight",
        "down": "lora_down.weight",
        "diff": "diff",
        "diff_b": "diff_b",
        "dora_scale": "dora_scale",
    },
    "peft": {
        "up": "lora_B.weight",
        "down": "lora_A.weight",
        "bias": "lora_B.bias",
        "magnitude": "lora_magnitude_vector",
    },
}
_TITLES: Mapping[Names, str] = {"kohya": "kohya's", "peft": "PEFT's"}
# Of another file, or of another state of it.
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "modelspec.thumbnail")
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
_BASE_VERSIONS: Mapping[str, str] = {  # kohya sd-scripts, library/train_util.py, MODEL_VERSION_*
    "sd1": "sd_v1",
    "sd2": "sd_v2",
    "sdxl": "sdxl_base_v1-0",
    "sd3": "sd3",
    "flux": "flux1",
}


@dataclass(frozen=True)
class Written:
    """An adapter file that was written.

    ranks        rank → how many modules have it
    sha256_data  of the tensor data in file order
    """

    output: Path
    nbytes: int
    modules: int
    ranks: Mapping[int, int]
    sha256_data: str


def check_output(output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse an output that is an input, exists, or cannot be, before any work is done."""
    if output.is_dir():
        raise OutputError(f"the output {str(output)!r} is a folder", fix="give a file's name")
    if output.suffix != ".safetensors":
        raise OutputError(
            f"the output {str(output)!r} does not end in .safetensors",
            fix=f"write {str(as_safetensors(output))!r}",
        )
    place = Place(output, (output,), tuple(inputs))
    raise_all([*place.problems(force=force), *folder_problems(output.parent, 0)])
    if (output.parent / PEFT_CONFIG).exists():
        raise OutputError(
            f"{PEFT_CONFIG} lies there: its rank and alpha would be taken for this adapter's",
            where=str(output.parent),
            fix="write to another folder",
        )


class AdapterWriter:
    """Takes modules one by one; `finish` lays them out and gives the file its name.

    dtype     of all weights, as recipes spell it ("fp16"). An alpha is always fp32.
    replaces  whether a file of the output's name may be there, or appear meanwhile
    """

    def __init__(self, output: Path, *, names: Names, dtype: str, replaces: bool) -> None:
        self.output = output
        self._replaces = replaces
        self.names: Names = names
        self._dtype = RECIPE_DTYPES[dtype]
        self._specs: dict[str, tuple[TensorSpec, int]] = {}
        self._ranks: dict[str, int] = {}
        self._alphas: dict[str, float] = {}
        self._parts: dict[str, frozenset[str]] = {}
        self._end = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            with ExitStack() as stack:
                stack.enter_context(made_folder(self.output.parent))
                self._spool: IO[bytes] = stack.enter_context(
                    tempfile.TemporaryFile(dir=self.output.parent, prefix=".ckptools-", buffering=0)
                )
                self._stack = stack.pop_all()
        except OSError as exc:
            raise output_error(exc, self.output) from exc
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, exc, tb)

    def add(
        self,
        module: str,
        parts: Mapping[str, Tensor],
        *,
        rank: int | None = None,
        alpha: float | None = None,
    ) -> dict[str, Tensor]:
        """Write a module's parts, rounded to the file's dtype; returns them as they now are.

        parts  canonical part → tensor
        rank, alpha  of low-rank modules; alpha / rank multiplies them
        """
        import torch

        from ckptools.evaluation import torch_dtype

        stored: dict[str, Tensor] = {}
        for part, tensor in parts.items():
            suffix = _SUFFIXES[self.names].get(part)
            if suffix is None:
                raise InputError(
                    f"{_TITLES[self.names]} names have none for {part!r}",
                    where=module,
                    fix="use the other --names",
                )
            name = f"{module}.{suffix}"
            stored[part] = tensor.detach().to(torch_dtype(self._dtype)).contiguous()
            if not bool(torch.isfinite(stored[part]).all()):
                raise NonFiniteError(
                    f"{part} holds NaN or Inf, or is too large for {self._dtype}",
                    where=name,
                    fix="use --dtype fp32 or bf16",
                )
            self._append(TensorSpec(name, self._dtype, tuple(tensor.shape)), _bytes(stored[part]))
        self._count(module, rank, alpha)
        self._parts[module] = frozenset(parts)
        return stored

    def carry(
        self,
        source: Checkpoint,
        module: str,
        parts: Mapping[str, str],
        *,
        rank: int | None = None,
        alpha: float | None = None,
    ) -> None:
        """Copy tensors as they are, under their names; rank and alpha as for `add`.

        parts  canonical part → tensor name
        """
        self._count(module, rank, alpha, told=False)
        self._parts[module] = frozenset(parts)
        for key in parts.values():
            self._append(source[key], source.read(key))

    def copy(self, source: Checkpoint, keys: Sequence[str]) -> None:
        """Copy tensors that belong to no module, such as a bundled embedding's."""
        for key in keys:
            self._append(source[key], source.read(key))

    def _count(
        self, module: str, rank: int | None, alpha: float | None, *, told: bool = True
    ) -> None:
        import struct

        if rank is None:
            return
        self._ranks[module] = rank
        self._alphas[module] = float(rank if alpha is None else alpha)
        if self.names == "kohya" and told:
            data = struct.pack("<f", self._alphas[module])
            self._append(TensorSpec(f"{module}.alpha", "F32", ()), data)

    def _append(self, spec: TensorSpec, data: bytes | memoryview) -> None:
        if spec.name in self._specs:
            raise InputError("is written twice", where=spec.name)
        view = memoryview(data).cast("B")
        try:
            while view:
                view = view[self._spool.write(view) :]
        except OSError as exc:
            raise output_error(exc, self.output) from exc
        self._specs[spec.name] = (spec, self._end)
        self._end += spec.nbytes

    def finish(self, metadata: Mapping[str, str], *, family: str = "") -> Written:
        """Write the file whole, look at it from outside, and give it its name.

        metadata  entries to carry; what describes ranks, names and hashes is set anew
        """
        from ckptools.verify import check_structure

        specs = sorted((spec for spec, _ in self._specs.values()), key=file_order)
        digest = hashlib.sha256()
        for spec in specs:
            for chunk in self._chunks(spec):
                digest.update(chunk)
        entries = self._metadata(metadata, family, digest.hexdigest())
        layout = lay_out(specs, entries, self.output)
        with PartFile(layout, replaces=self._replaces) as part:
            for spec in layout.specs:
                position = layout.starts[spec.name]
                for chunk in self._chunks(spec):
                    part.write(chunk, position)
                    position += len(chunk)
            check_structure(layout.part, layout)
            part.sync()
            part.commit()
        manifest_path(self.output).unlink(missing_ok=True)  # of the file that was replaced
        sync_folder(self.output.parent)
        return Written(
            output=self.output,
            nbytes=layout.file_bytes,
            modules=len(self._parts),
            ranks=dict(sorted(Counter(self._ranks.values()).items())),
            sha256_data=digest.hexdigest(),
        )

    def _chunks(self, spec: TensorSpec) -> Iterator[bytes]:
        self._spool.seek(self._specs[spec.name][1])
        left = spec.nbytes
        while left:
            chunk = self._spool.read(min(left, _CHUNK))
            if not chunk:
                raise OutputError("the temporary file became shorter", where=str(self.output))
            left -= len(chunk)
            yield chunk

    def _metadata(self, given: Mapping[str, str], family: str, sha256: str) -> dict[str, str]:
        from ckptools.manifest import version

        entries = {key: text for key, text in given.items() if key not in _STALE}
        for key in (CONFIG_KEY, "ss_network_dim", "ss_network_alpha"):
            entries.pop(key, None)
        entries.setdefault("modelspec.sai_model_spec", "1.0.1")
        entries.setdefault("modelspec.implementation", "diffusers")
        entries["modelspec.title"] = self.output.stem
        entries["modelspec.hash_sha256"] = f"0x{sha256}"
        entries["ckptools_version"] = version()
        if self.names == "peft":
            entries["format"] = "pt"
            if self._ranks:
                entries[CONFIG_KEY] = json.dumps(self._configs(), sort_keys=True)
            return entries
        if family in _BASE_VERSIONS:
            entries.setdefault("ss_base_model_version", _BASE_VERSIONS[family])
        entries.setdefault("ss_network_module", "networks.lora")
        entries["ss_network_dim"] = _one(self._ranks.values())
        entries["ss_network_alpha"] = _one(self._alphas.values())
        return entries

    def _configs(self) -> dict[str, object]:
        """PEFT's config of each component, keys "unet.r" and so on, as diffusers packs them."""
        groups: dict[str, list[str]] = {}
        for module in self._ranks:
            first = module.partition(".")[0]
            groups.setdefault(first if first in _COMPONENTS else "", []).append(module)
        configs: dict[str, object] = {}
        for component, modules in sorted(groups.items()):
            prefix = f"{component}." if component else ""
            for key, value in self._config(modules, prefix).items():
                configs[prefix + key] = value
        return configs

    def _config(self, modules: Sequence[str], prefix: str) -> dict[str, object]:
        rank = Counter(self._ranks[m] for m in modules).most_common(1)[0][0]
        alpha = Counter(self._alphas[m] for m in modules).most_common(1)[0][0]
        held = {part for module in modules for part in self._parts[module]}
        plain = {m: m.removeprefix(prefix).removeprefix("base_model.model.") for m in modules}
        return {
            "r": rank,
            "lora_alpha": alpha,
            # a pattern fits the ends of names: "^" keeps `proj_out` from fitting `x.proj_out`
            "rank_pattern": {
                f"^{plain[m]}": self._ranks[m] for m in modules if self._ranks[m] != rank
            },
            "alpha_pattern": {
                f"^{plain[m]}": self._alphas[m] for m in modules if self._alphas[m] != alpha
            },
            "target_modules": sorted(plain.values()),
            **{key: True for key, part in _TOLD_PARTS.items() if part in held},
        }


_TOLD_PARTS = {"use_dora": "magnitude", "lora_bias": "bias"}  # which loaders must know of


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _one(numbers: Iterable[float]) -> str:
    """The one number, or kohya's word for several."""
    found = set(numbers)
    return f"{found.pop():g}" if len(found) == 1 else "Dynamic"


def dtype_of(source: Checkpoint) -> str:
    """The dtype that most of an adapter's bytes have, as recipes spell it; fp32 where none fits."""
    sizes: Counter[str] = Counter()
    for spec in source.values():
        sizes[spec.dtype] += spec.nbytes
    known = {RECIPE_DTYPES[name]: name for name in DTYPES}
    return known.get(sizes.most_common(1)[0][0], "fp32")
