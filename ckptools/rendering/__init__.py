"""Test pictures of models, beside their parents, and what the pictures say.

    a file, or a plan in memory ──▶ pictures by prompt and seed ──▶ checks ──▶ folder of reports

A merge is rendered without being written: the engine fills the modules of a resident pipeline with
the bytes that the file would have. Parents draw the same prompts from the same seeds; their
pictures are kept in the user's cache, by what the files hold. Prints nothing.

    ways_in    from files, a plan or a recipe: start reading here
    orders     what to draw, settled by the model
    subjects   the models that draw
    studio     the drawing, one model after the other
    judging    figures of pictures, and verdicts
    scoring    scores by a CLIP model: no verdicts
    reports    the folder's files
    folder     whose a folder is, and what in it makes room
    cache      parents' pictures from other days
    records    the data that all of them hand round
"""

from ckptools.rendering.orders import (
    Order,
    check_order,
    check_section,
    default_folder,
    numbered,
    section_order,
    settle,
)
from ckptools.rendering.records import (
    Check,
    Drawn,
    Progress,
    RenderFailedError,
    Rendering,
    Row,
    Score,
    Subject,
    Verdict,
)
from ckptools.rendering.reports import as_json, versions
from ckptools.rendering.scoring import mean_scores
from ckptools.rendering.studio import render
from ckptools.rendering.subjects import file_subject, parents_of
from ckptools.rendering.ways_in import (
    render_files,
    render_gate,
    render_plan,
    render_saved,
)

__all__ = [
    "Check",
    "Drawn",
    "Order",
    "Progress",
    "RenderFailedError",
    "Rendering",
    "Row",
    "Score",
    "Subject",
    "Verdict",
    "as_json",
    "check_order",
    "check_section",
    "default_folder",
    "file_subject",
    "mean_scores",
    "numbered",
    "parents_of",
    "render",
    "render_files",
    "render_gate",
    "render_plan",
    "render_saved",
    "section_order",
    "settle",
    "versions",
]
