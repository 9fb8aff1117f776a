"""From files, from a plan, or from a recipe's `render:` to a rendering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ckptools.errors import InputError, Interrupted
from ckptools.hubref import hub_ref_of, short_name
from ckptools.manifest import planned_id
from ckptools.plan import Plan
from ckptools.rendering.orders import (
    Order,
    against_files,
    check_order,
    default_folder,
    section_order,
)
from ckptools.rendering.records import Progress, RenderFailedError, Rendering, Subject
from ckptools.rendering.studio import render
from ckptools.rendering.subjects import file_subject, load_plan, parents_of


def render_files(
    sources: Sequence[Path],
    order: Order,
    folder: Path | None = None,
    *,
    beside: Sequence[Path] = (),
    use_cache: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Rendering:
    """Models in files, compared with others (`beside`).

    folder  default: `<name of the first>-render` in the current folder
    force   draw into a folder that holds other things
    """
    check_order(order)
    _check_there([*sources, *beside])
    subjects = [file_subject(path, order) for path in sources]
    subjects += [file_subject(path, order, parent=True) for path in beside]
    return render(
        subjects,
        order,
        folder or Path(f"{short_name(sources[0])}-render"),
        title=", ".join(path.name for path in sources),
        use_cache=use_cache,
        force=force,
        progress=progress,
    )


def render_plan(
    plan: Plan,
    sha256s: Mapping[str, str],
    order: Order,
    folder: Path | None = None,
    *,
    output: Path | None = None,
    beside: Sequence[Path] = (),
    use_cache: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Rendering:
    """What a plan makes, beside its models: in memory, or `output`, the file that was written.

    sha256s  model → sha256, as `merge` would write them into the output's metadata
    """
    check_order(order)
    recipe = plan.recipe
    section = recipe.render
    title = recipe.merge.text.strip()
    if output is None:
        merge = Subject(
            "merge",
            recipe.output_path.name,
            lambda device, dtype: load_plan(plan, order, sha256s, device=device, dtype=dtype),
            merge_id=planned_id(plan),
        )
    else:
        merge = file_subject(output, order, label="merge")
    against = section.against if section is not None else None
    parents = parents_of(plan, order) if against is None else ()
    others = [*against_files(recipe), *beside]
    _check_there(others)
    return render(
        [merge, *parents, *(file_subject(path, order, parent=True) for path in others)],
        order,
        folder or default_folder(plan),
        title=title,
        use_cache=use_cache,
        force=force,
        progress=progress,
    )


def _check_there(paths: Sequence[Path]) -> None:
    """A path that leads nowhere is said before anything is drawn."""
    for path in paths:
        if not path.exists() and hub_ref_of(path) is None:
            raise InputError("there is no such file", where=str(path), fix="check the path")


def render_saved(
    plan: Plan, output: Path, *, force: bool = False, progress: Progress | None = None
) -> Rendering:
    """The file that a merge has written, as the recipe's `render:` says."""
    order = section_order(plan.recipe)
    return render_plan(plan, {}, order, output=output, force=force, progress=progress)


def render_gate(
    plan: Plan,
    sha256s: Mapping[str, str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Rendering:
    """A merge in memory, before it is written; `RenderFailedError` where its checks fail.

    An interruption is one of the merge, too.
    """
    order = section_order(plan.recipe)
    found = render_plan(plan, sha256s, order, force=force, progress=progress)
    if found.interrupted:
        raise Interrupted(f"interrupted: the merge is not saved; {found.kept}")
    if found.verdict == "fail":
        reasons = "; ".join(check.reason for check in found.checks if check.verdict == "fail")
        raise RenderFailedError(
            f"the merge is not saved: {reasons}",
            where=plan.recipe.render.where if plan.recipe.render else "",
            fix=f"look at {found.report}; `when: after_save` saves it all the same",
        )
    return found
