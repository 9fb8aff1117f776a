"""How things are shown: tables, progress, errors, JSON. The only module that imports rich.

Data goes to stdout, progress and messages to stderr. Tensor names and metadata are untrusted
text: control characters are shown as escapes and nothing is read as markup.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptools.errors import CkptError, ManyErrors
from ckptools.hubref import cached_ref, is_hub_text, is_local, shown
from ckptools.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.table import Table

    from ckptools.baking import Baking
    from ckptools.family import Family
    from ckptools.methods import Method
    from ckptools.opening import Source
    from ckptools.plan import Plan, Step
    from ckptools.workflow import MergeResult

_COMMON_FORMS = 3
_SHORT_FORM = 24  # letters of a formula that fits beside the numbers
_WIDTH_OF_PIPES = 110
_LEAST_FOLDED = 6
_BETWEEN_COLUMNS = 3


def safe(text: str) -> str:
    """One line that cannot move the cursor: control characters as \\x1b, \\n and the like."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def gigabytes(nbytes: float) -> str:
    """Decimal sizes: 2.13 GB, 4.5 MB, 812 kB, 3 B."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def shown_path(path: Path) -> str:
    """A path without detours: recipes/../out is out."""
    is_elsewhere = not is_local(path) or cached_ref(path) is not None
    return shown(path) if is_elsewhere else os.path.normpath(path)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        file=stream,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
        width=None if stream.isatty() else _WIDTH_OF_PIPES,
    )


def _table(
    *columns: str,
    numbers: Sequence[int] = (),
    wide: Sequence[int] = (),
    names: Sequence[int] = (),
) -> Table:
    """An empty table.

    numbers  columns that are set to the right
    wide     columns that take several lines where there is no room; default: the last
    names    columns that do so on a terminal alone: what is piped is searched line by line
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    folding = [*wide, *(names if sys.stdout.isatty() else ())]
    for position, column in enumerate(columns):
        folds = position in (folding if wide or names else [len(columns) - 1])
        table.add_column(
            column,
            justify="right" if position in numbers else "left",
            no_wrap=not folds,
            overflow="fold",
        )
    return table


def _row(table: Table, *cells: str | list[str]) -> None:
    """Add a row; a list is a cell of several lines."""
    from rich.text import Text

    lines = ([cell] if isinstance(cell, str) else cell for cell in cells)
    table.add_row(*(Text("\n".join(map(safe, cell))) for cell in lines))


def _show_table(table: Table) -> None:
    console = _console()
    # A terminal too narrow for the numbers breaks the lines itself: it is better than 7 for 703 kB.
    console.width = max(console.width, _least_width(table))
    # long cells are folded; with the console's soft_wrap they would be cut off
    console.print(table, soft_wrap=False)


def _least_width(table: Table) -> int:
    """The width at which no cell of the columns that do not fold is cut off."""
    from rich.cells import cell_len

    widths = [
        max(cell_len(line) for cell in (column.header, *column.cells)
            for line in str(cell).split("\n"))
        if column.no_wrap else _LEAST_FOLDED
        for column in table.columns
    ]  # fmt: skip
    return sum(widths) + _BETWEEN_COLUMNS * len(widths) - 1


# --- JSON and errors ---------------------------------------------------------------------------


def show_json(command: str, body: Mapping[str, object], *, version: int = 1) -> None:
    """Print `{"schema": "ckptools.<command>/1", …}` on stdout."""
    document = {"schema": f"ckptools.{command}/{version}", **body}
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def error_json(error: CkptError) -> dict[str, object]:
    """The `error` object of the JSON contract; several errors add a list."""
    errors = error.errors if isinstance(error, ManyErrors) else (error,)
    objects: list[dict[str, object]] = [
        {"code": one.code, "message": one.what, "where": one.where, "fix": one.fix}
        for one in errors
    ]
    return {**objects[0], "others": objects[1:]} if len(objects) > 1 else objects[0]


def show_error(error: CkptError) -> None:
    """One block per error on stderr: where, what, fix."""
    from rich.text import Text

    console = _console(stderr=True)
    for one in error.errors if isinstance(error, ManyErrors) else (error,):
        text = Text()
        text.append("error: ", style="bold red")
        if one.where:
            text.append(f"{safe(one.where)}: ")
        # a formula is shown over several lines
        text.append("\n".join(map(safe, one.what.split("\n"))), style="bold")
        if one.fix:
            text.append("\n  fix: ", style="green")
            text.append(safe(one.fix))
        console.print(text)


def show_line(text: str) -> None:
    """One line of data on stdout."""
    _console().print(safe(text))


def show_message(text: str) -> None:
    """One line on stderr."""
    _console(stderr=True).print(safe(text))


# --- plan --------------------------------------------------------------------------------------


def plan_json(plan: Plan, notes: Sequence[str] = ()) -> dict[str, object]:
    """The plan's contract keys, and per component and model what there is to know.

    notes  besides the plan's own
    """
    return {
        "recipe": str(plan.recipe.path),
        "output": shown_path(plan.recipe.output_path),
        "family": plan.base.detection.family,
        "variant": plan.variant,
        "base": plan.base.name,
        "models": {source.name: _source_json(source) for source in plan.sources},
        "adapters": {baking.source.name: _baking_json(baking) for baking in plan.bakings},
        "tensors": plan.counts,
        "components": {
            component: {
                "tensors": dict(Counter(step.action for step in steps)),
                "bytes": sum(step.spec.nbytes for step in steps),
                "dtypes": sorted({step.spec.dtype for step in steps}),
                "forms": dict(_forms(steps)),
                "reasons": dict(_reasons(steps)),
            }
            for component, steps in _by_component(plan).items()
        },
        "read_bytes": plan.read_bytes,
        "output_bytes": plan.file_bytes,
        "peak_bytes": plan.peak_bytes,
        "free_bytes": _free_bytes(plan),
        "warnings": list(plan.warnings),
        "notes": [*plan.notes, *notes],
    }


def _source_json(source: Source) -> dict[str, object]:
    detection = source.detection
    return {
        "file": source.ref.path if is_hub_text(source.ref.path) else str(source.checkpoint.path),
        "bytes": source.checkpoint.file_bytes,
        "tensors": len(source.checkpoint),
        "family": detection.family,
        "variant": detection.variant,
        "evidence": list(detection.evidence),
        "rejected": [{"family": r.family, "reason": r.reason} for r in detection.rejected],
    }


def _baking_json(baking: Baking) -> dict[str, object]:
    from ckptools.baking import adapter_bases, adapter_kinds, adapter_ranks

    file = baking.file
    return {
        "kind": list(adapter_kinds(file)),
        "base": [fit.family for fit in adapter_bases(file)],
        "modules": len(file.modules),
        "ranks": list(adapter_ranks(file)),
        "scales": list(baking.used_scales),
        "matched": baking.matched,
        "unmatched": list(baking.match.unmatched),
    }


def _free_bytes(plan: Plan) -> int:
    import shutil

    from ckptools.placement import existing_folder

    return shutil.disk_usage(existing_folder(plan.recipe.output_path.parent)).free


def _by_component(plan: Plan) -> dict[str, list[Step]]:
    groups: dict[str, list[Step]] = {}
    order = [*plan.family.components, "other"]
    for step in plan.steps:
        groups.setdefault(step.component, []).append(step)
    return dict(sorted(groups.items(), key=lambda item: order.index(item[0])))


def _forms(steps: Sequence[Step]) -> list[tuple[str, int]]:
    return Counter(str(step.form) for step in steps if step.form is not None).most_common()


def _reasons(steps: Sequence[Step]) -> list[tuple[str, int]]:
    return Counter(step.why for step in steps if step.form is None and step.why).most_common()


def show_plan(plan: Plan, notes: Sequence[str] = (), *, details: bool = False) -> None:
    """Models, what becomes of each component, sizes, notes and warnings.

    notes    besides the plan's own
    details  also list every tensor that is not merged, with its reason
    """
    models = _table("model", "file", "what", "size", numbers=(3,))
    for source in plan.sources:
        size = gigabytes(source.checkpoint.file_bytes)
        _row(models, source.name, source.label, source.title, size)
    _show_table(models)
    if plan.bakings:
        _show_adapters(plan)
    _show_components(plan)
    show_line(
        f"read {gigabytes(plan.read_bytes)}, write {gigabytes(plan.file_bytes)} "
        f"({gigabytes(_free_bytes(plan))} free), memory about {gigabytes(plan.peak_bytes)}"
    )
    show_line(f"output: {shown_path(plan.recipe.output_path)}")
    for note in (*plan.notes, *notes):
        show_line(f"note: {note}")
    for warning in plan.warnings:
        show_line(f"warning: {warning}")
    if details:
        _show_unmerged(plan)


def _show_components(plan: Plan) -> None:
    """What becomes of each component; formulas below the table where they need the width."""
    from ckptools.plan import ACTIONS

    found = _by_component(plan)
    actions = [action for action in ACTIONS if action == "merged" or plan.counts[action]]
    forms = {component: _forms_text(steps) for component, steps in found.items()}
    beside = all(len(lines) < 2 and len("".join(lines)) <= _SHORT_FORM for lines in forms.values())
    last = ["formula"] if beside else []
    numbers = tuple(range(1, len(actions) + 2))
    table = _table("component", *actions, "size", "stored as", *last, numbers=numbers)
    for component, steps in found.items():
        counts = Counter(step.action for step in steps)
        cells = [f"{counts[action]:,}" if counts[action] else "·" for action in actions]
        dtypes = " ".join(sorted({step.spec.dtype for step in steps}))
        size = gigabytes(sum(step.spec.nbytes for step in steps))
        _row(table, component, *cells, size, dtypes, *([forms[component]] if beside else []))
    _show_table(table)
    if not beside:
        table = _table("component", "formula")
        for component, lines in forms.items():
            _row(table, component, lines)
        _show_table(table)


def _show_adapters(plan: Plan) -> None:
    from ckptools.baking import adapter_bases, adapter_kinds, adapter_ranks, span

    table = _table("adapter", "kind", "for", "rank", "scale", "modules", numbers=(3, 4))
    for baking in plan.bakings:
        file, ranks = baking.file, adapter_ranks(baking.file)
        bases = " or ".join(fit.family for fit in adapter_bases(file)) or "·"
        parts = [f"{count:,} in {component}" for component, count in baking.matched.items()]
        if baking.match.unmatched:
            parts.append(f"{len(baking.match.unmatched):,} match nothing")
        _row(table, baking.source.name, " and ".join(adapter_kinds(file)), bases,
             span(ranks) if ranks else "·", span(baking.used_scales), ", ".join(parts))  # fmt: skip
    _show_table(table)


def _show_unmerged(plan: Plan) -> None:
    for step in plan.steps:  # lines, not a table: long names are searched for and copied
        if step.action != "merged":
            show_line(f"{step.action}: {step.spec.name}, {step.spec}: {step.why}")
    for model, names in plan.dropped.items():
        for name in names:
            show_line(f"left out: {name} of {model}")


def _forms_text(steps: Sequence[Step]) -> list[str]:
    forms = _forms(steps)
    if not forms:
        reasons = _reasons(steps)
        return [reasons[0][0]] if reasons else []
    if len(forms) == 1:
        return [forms[0][0]]
    shown = [f"{form}  for {count:,}" for form, count in forms[:_COMMON_FORMS]]
    rest = len(forms) - _COMMON_FORMS
    return [*shown, f"… {rest} more"] if rest > 0 else shown


# --- explain -----------------------------------------------------------------------------------


def explain_json(plan: Plan, step: Step) -> dict[str, object]:
    """One tensor's step as data."""
    from ckptools.baking import changes_in, module_kind
    from ckptools.program import reads_of

    return {
        "tensor": step.spec.name,
        "dtype": step.spec.dtype,
        "shape": list(step.spec.shape),
        "component": step.component,
        "block": step.block,
        "action": step.action,
        "why": step.why,
        "formula": plan.recipe.merge.text.strip(),
        "with_numbers": str(step.form) if step.form is not None else None,
        "params": {
            name: {"value": line.value, "selector": line.selector, "where": line.where}
            for name, line in step.lines.items()
        },
        "adapters": [
            {
                "adapter": one.adapter,
                "module": one.change.module.name,
                "kind": module_kind(one.change.module),
                "rank": one.change.module.rank,
                "scale": one.change.scale,
                "weight": one.weight,
            }
            for one in changes_in(plan, step)
        ],
        "reads": [
            {
                "model": plan.sources[read.source].name,
                "tensor": read.name,
                "dtype": read.spec.dtype,
                "shape": list(read.spec.shape),
            }
            for read in reads_of(step.program)
        ],
    }


def show_explanation(plan: Plan, step: Step) -> None:
    """The formula with the numbers of one tensor, and which line set each."""
    from ckptools.baking import changes_in, module_kind
    from ckptools.program import reads_of

    show_line(step.spec.name)
    place = f"component {step.component}" + (f", block {step.block}" if step.block else "")
    show_line(f"  {step.spec}, {place}")
    show_line(f"  {step.action}: {step.why}")
    show_line(f"  formula: {plan.recipe.merge.text.strip()}")
    if step.form is not None:
        show_line(f"  here:    {step.form}")
    for name, line in step.lines.items():
        show_line(f"  {name} = {line.value:g}, set by {line.selector!r} at {line.where}")
    for one in changes_in(plan, step):
        module = one.change.module
        rank = f" of rank {module.rank}" if module.rank is not None else ""
        show_line(
            f"  {one.adapter}: {module.name}, {module_kind(module)}{rank}, "
            f"scale {one.change.scale:g}, weight {one.weight:g}"
        )
    for read in reads_of(step.program):
        show_line(f"  {plan.sources[read.source].name}: {read.name}, {read.spec}")


# --- merge -------------------------------------------------------------------------------------


def merge_json(result: MergeResult) -> dict[str, object]:
    """The contract keys of `merge`."""
    from ckptools.rendering import as_json  # knows plans and recipes: most commands need neither

    return {
        "output": shown_path(result.output),
        "sha256_data": result.sha256_data,
        "seconds": round(result.seconds, 3),
        "peak_bytes": result.peak_bytes,
        "manifest": shown_path(result.manifest),
        "verified": {"finite": result.finite, "recomputed": result.recomputed},
        "tensors": result.plan.counts,
        "output_bytes": result.file_bytes,
        "warnings": list(result.plan.warnings),
        "notes": [*result.plan.notes, *result.notes],
        **({} if result.rendering is None else {"render": as_json(result.rendering)}),
    }


_MOST_NOTES = 8


def show_merge(result: MergeResult) -> None:
    """What was done, in five lines."""
    counts = result.plan.counts
    parts = [f"{count:,} {action}" for action, count in counts.items() if count]
    show_line(f"wrote {shown_path(result.output)} ({gigabytes(result.file_bytes)})")
    show_line(f"  tensors: {', '.join(parts)}")
    finite = "all values finite" if result.finite else "not all values finite"
    show_line(
        f"  checked: re-read by safetensors, {finite}, {result.recomputed} tensors computed again"
    )
    show_line(f"  sha256 of the data: {result.sha256_data}")
    show_line(f"  manifest: {shown_path(result.manifest)}")
    for note in result.notes[:_MOST_NOTES]:
        show_line(f"  note: {note}")
    if result.notes[_MOST_NOTES:]:
        show_line(f"  … and {len(result.notes) - _MOST_NOTES:,} more (--json lists them)")
    peak = f", peak memory {gigabytes(result.peak_bytes)}" if result.peak_bytes else ""
    show_line(f"  {result.seconds:.1f} s{peak}")


class WarningsOnly(Progress):
    """Says nothing but the plan's warnings, on stderr."""

    def planned(self, plan: Plan) -> None:
        """Every warning, before the merge begins."""
        for warning in plan.warnings:
            show_message(f"warning: {warning}")


class BarProgress(Progress):
    """A progress bar by bytes, with rate and time left, on stderr."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=_console(stderr=True),
            transient=True,
            disable=not _console(stderr=True).is_terminal,  # else its end is an empty line
        )
        self._task: Any = None

    def __enter__(self) -> BarProgress:
        self._bars.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bars.__exit__(*exc)

    def planned(self, plan: Plan) -> None:
        """Say what will happen, and every warning, before it does."""
        models = ", ".join(f"{source.name} = {source.label}" for source in plan.sources)
        self._bars.console.print(safe(f"{plan.recipe.merge.text.strip()}   ({models})"))
        for warning in plan.warnings:
            self._bars.console.print(safe(f"warning: {warning}"), style="yellow")
        for note in plan.notes:
            self._bars.console.print(safe(f"note: {note}"))

    def start(self, stage: str, total_bytes: int) -> None:
        """A new bar in place of the old one."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(stage, total=total_bytes)

    def advance(self, nbytes: int) -> None:
        """So many bytes more."""
        self._bars.advance(self._task, nbytes)


def picture_bars() -> Bars:
    """Bars on stderr that count pictures and their steps."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_console(stderr=True),
        transient=True,
        disable=not _console(stderr=True).is_terminal,  # else its end is an empty line
    )


# --- lists -------------------------------------------------------------------------------------


def methods_json(methods: Mapping[str, Method]) -> list[dict[str, object]]:
    """Every method and its parameters, as data."""
    return [
        {
            "name": method.name,
            "summary": method.summary,
            "formula": method.formula,
            "source": method.source,
            "access": method.access,
            "models": [*method.models, *([f"{method.variadic}…"] if method.variadic else [])],
            "keyword_models": list(method.keyword_models),
            "numbers": {scalar.name: scalar.default for scalar in method.scalars.values()},
            "ranges": {name: list(ends) for name, ends in method.ranges.items()},
        }
        for method in methods.values()
    ]


def show_methods(methods: Mapping[str, Method]) -> None:
    """One block per method: how it is called, what it does, its formula and source."""
    from ckptools.formula import usage

    for method in methods.values():
        show_line(usage(method))
        show_line(f"  {method.summary}")
        show_line(f"  {method.formula}")
        for name, (least, most) in method.ranges.items():
            show_line(f"  {name}: {least:g} to {most:g}")
        show_line(f"  source: {method.source}")
        show_line("")


def families_json(families: Mapping[str, Family]) -> list[dict[str, object]]:
    """Every family with its variants, components and blocks, as data."""
    return [
        {
            "id": family.id,
            "title": family.title,
            "kind": family.kind,
            "variants": {
                variant: family.architecture(variant) or None for variant in family.variants
            },
            "components": list(family.components),
            "blocks": list(family.blocks),
        }
        for family in families.values()
    ]


def show_families(families: Mapping[str, Family]) -> None:
    """A table of what can be recognised."""
    table = _table("family", "what", "kind", "variants", "blocks", numbers=(4,), wide=(3,))
    for family in families.values():
        _row(table, family.id, family.title, family.kind, " ".join(family.variants),
             str(len(family.blocks) or "·"))  # fmt: skip
    _show_table(table)
