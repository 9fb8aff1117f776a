"""The layers of `docs/architecture.md`: imports point down only, and stay light where they must."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptools

PACKAGE = Path(ckptools.__file__).parent
LAYERS = (
    {
        "errors",
        "datafile",
        "tensors",
        "hubref",
        "interrupts",
        "crew",
        "codec",
        "native",
        "filetypes",
        "progress",
    },
    {
        "checkpoint",
        "sources",
        "copies",
        "pickles",
        "folders",
        "writer",
        "formula",
        "recipe",
        "family",
        "selectors",
        "methods",
        "program",
        "keymap",
        "known",
        "quantised",
        "lineage",
        "lora",
    },
    {"plan", "opening", "placement", "baking", "footprint", "plain", "lowrank", "evaluation"},
    {"engine", "measure", "manifest", "hashing"},
    {"verify", "render", "variants", "check", "hub"},
    {
        "workflow",
        "sweep",
        "rendering",
        "convert",
        "convert_settings",
        "adapters",
        "soundness",
        "kinship",
        "inspection",
        "diff",
        "checking",
        "reproduce",
        "publication",
    },
    {
        "report",
        "report_files",
        "report_adapters",
        "report_convert",
        "report_inspect",
        "report_diff",
        "report_sweep",
        "report_render",
        "report_check",
        "report_sources",
        "report_publish",
    },
    {"cli"},
    {"__main__"},
)
THREADS_OF_BLAS = "OPENBLAS_NUM_THREADS"
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
HEAVY = {"torch", "numpy", "diffusers", "huggingface_hub", "safetensors", "transformers"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    """The first name below the package: "plan", or "methods" for all within."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def layer_of(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def imports(path: Path, *, at_import_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a module, those for type checkers alone left out.

    at_import_only  leave out those inside functions
    """

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if at_import_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                yield child.lineno, child.module or ""
                if child.module == "ckptools":
                    yield from ((child.lineno, f"ckptools.{a.name}") for a in child.names)
            else:
                yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def calls(path: Path) -> set[str]:
    """Everything a module calls, as written: "print", "sys.exit"."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_every_module_has_a_layer() -> None:
    assert len(MODULES) >= 30
    assert {part_of(path) for path in MODULES} - set().union(*LAYERS) == set()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    own = part_of(path)
    upwards = [
        f"{relative(path)}:{line} imports {name}"
        for line, name in imports(path)
        if name.startswith("ckptools.")
        and (part := name.split(".")[1]) != own
        and layer_of(part) > layer_of(own)
    ]

    assert upwards == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        part: {
            name.split(".")[1]
            for path in MODULES
            if part_of(path) == part
            for _, name in imports(path)
            if name.startswith("ckptools.")
        }
        - {part}
        for part in set().union(*LAYERS)
    }
    assert sum(map(len, graph.values())) >= 30
    while leaves := {part for part, needs in graph.items() if not needs & graph.keys()}:
        graph = {part: needs for part, needs in graph.items() if part not in leaves}

    assert graph == {}


def test_only_report_imports_rich() -> None:
    importers = {
        relative(path)
        for path in MODULES
        for _, name in imports(path)
        if name.split(".")[0] == "rich"
    }

    assert importers == {"report.py"}


def test_only_the_command_line_imports_click_and_exits() -> None:
    importers = {
        part_of(path)
        for path in MODULES
        for _, name in imports(path)
        if name.split(".")[0] == "click"
    }
    exits = {
        relative(path)
        for path in MODULES
        if calls(path) & {"sys.exit", "exit", "quit", "os._exit"}
        or "raise SystemExit" in path.read_text(encoding="utf-8")
    }

    assert importers == {"cli"}
    # before the command line is there; a crew ends its own forks
    assert exits == {"__main__.py", "cli/__init__.py", "crew.py"}


def test_nothing_prints_but_report_and_the_command_line() -> None:
    printing = {"print", "click.echo", "sys.stdout.write", "sys.stderr.write", "pprint", "echo"}
    printers = {part_of(path) for path in MODULES if calls(path) & printing}

    assert printers == {"report", "cli", "__main__"}


LIGHT = {
    *("errors", "tensors", "writer", "formula", "recipe", "family", "selectors", "program"),
    *("keymap", "plan", "footprint", "sources", "pickles"),
}


def test_modules_that_know_recipes_and_names_import_nothing_heavy() -> None:
    """Not even inside functions."""
    importers = {
        part_of(path)
        for path in MODULES
        for _, name in imports(path)
        if name.split(".")[0] in HEAVY
    }

    assert "engine" in importers
    assert not importers & LIGHT


@needs_proc
def test_diff_loads_no_planner_and_starts_no_threads_of_a_linear_algebra(
    sd1_models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """They would wait for one another, and for those of whoever else works."""
    code = (
        "import os, sys; from ckptools.cli import run; code = run(sys.argv[1:])\n"
        "loaded = {'torch', 'ckptools.plan', 'numpy'} & sys.modules.keys()\n"
        "print(code, *loaded, len(os.listdir('/proc/self/task')), file=sys.stderr)"
    )
    words = ["diff", "--json", *map(str, sd1_models[:2])]
    environment = {name: os.environ[name] for name in os.environ if name != THREADS_OF_BLAS}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, check=True, cwd=tmp_path, env=environment,
    )  # fmt: skip

    assert done.stderr.split() == ["0", "numpy", "1"]


def test_methods_import_torch_inside_their_functions() -> None:
    paths = [path for path in MODULES if part_of(path) == "methods"]
    assert len(paths) >= 5

    for path in paths:
        roots = {name.split(".")[0] for _, name in imports(path, at_import_only=True)}
        assert not roots & HEAVY, relative(path)


LOADED = """
import sys
from ckptools.cli import run
code = run({arguments!r})
heavy = {heavy!r}
print(code, *sorted(heavy & {{name.split(".")[0] for name in sys.modules}}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["merge", "--help"],
        ["methods"],
        ["families"],
        ["schema"],
        ["hash", "RECIPE", "--no-cache"],
        ["verify", "MODEL"],
        ["lock", "RECIPE"],
        ["inspect", "MODEL"],
        ["inspect", "MODEL", "--json", "--tensors", "*time_embed*"],
        ["plan", "RECIPE"],
        ["plan", "RECIPE", "--json"],
        ["explain", "RECIPE", "*time_embed.0.weight"],
    ],
)
def test_commands_that_only_look_load_nothing_heavy(
    arguments: list[str], sd1_models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {sd1_models[0]}, B: {sd1_models[1]}}}\n"
        "merge: slerp(A, B)\noutput: {path: out.safetensors}\n"
    )
    named = {"RECIPE": str(recipe), "MODEL": str(sd1_models[0])}
    words = [named.get(word, word) for word in arguments]
    code = LOADED.format(arguments=words, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )

    assert done.stdout
    assert done.stderr.strip() == "0"


def test_importing_the_package_does_nothing() -> None:
    code = "import sys, ckptools; print(*[m for m in sys.modules if m.startswith('ckptools')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["ckptools"]
