"""From files, from a plan, or from a recipe's `render:` to a rendering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ckptools.plan import Plan
from ckptools.rendering.orders import Order, check_order, section_order
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
    progress: Progress | None = None,
) -> Rendering:
    """Models in files, compared with others (`beside`).

    folder  default: `<name of the first>-render` in the current folder
    """
    check_order(order)
    subjects = [file_subject(path, order) for path in sources]
    subjects += [file_subject(path, order, parent=True) for path in beside]
    return render(
        subjects,
        order,
        folder or Path(f"{sources[0].stem}-render"),
        title=", ".join(path.name for path in sources),
        use_cache=use_cache,
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
        )
    else:
        merge = file_subject(output, order, label="merge")
    against = section.against if section is not None else None
    parents = parents_of(plan, order) if against is None else ()
    named = [recipe.path.parent / Path(text).expanduser() for text in against or ()]
    others = [file_subject(path, order, parent=True) for path in (*named, *beside)]
    return render(
        [merge, *parents, *others],
        order,
        folder or default_folder(plan),
        title=title,
        use_cache=use_cache,
        progress=progress,
    )


def render_saved(plan: Plan, output: Path, *, progress: Progress | None = None) -> Rendering:
    """The file that a merge has written, as the recipe's `render:` says."""
    return render_plan(plan, {}, section_order(plan.recipe), output=output, progress=progress)


def render_gate(
    plan: Plan, sha256s: Mapping[str, str], *, progress: Progress | None = None
) -> Rendering:
    """A merge in memory, before it is written; `RenderFailedError` where its checks fail.

    An interruption is one of the merge, too.
    """
    found = render_plan(plan, sha256s, section_order(plan.recipe), progress=progress)
    if found.interrupted:
        raise KeyboardInterrupt
    if found.verdict == "fail":
        reasons = "; ".join(check.reason for check in found.checks if check.verdict == "fail")
        raise RenderFailedError(
            f"the merge is not saved: {reasons}",
            where=plan.recipe.render.where if plan.recipe.render else "",
            fix=f"look at {found.report}; `when: after_save` saves it all the same",
        )
    return found


def default_folder(plan: Plan) -> Path:
    """Where a recipe's pictures go."""
    recipe = plan.recipe
    if recipe.render is not None and recipe.render.folder:
        return recipe.path.parent / Path(recipe.render.folder).expanduser()
    return recipe.output_path.with_name(f"{recipe.output_path.stem}-render")
