"""Builds `ckptools/kernels.c` with the C compiler at hand (`CC`, or `cc`).

Without one, or where it fails, the package is built all the same: it then computes by torch alone,
to the same bits, and slower.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE, LIBRARY = "ckptools/kernels.c", "ckptools/_kernels.so"
# No -march: it is chosen when they run. No contraction: a fused multiply-add rounds differently.
FLAGS = (
    "-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off",
    "-fno-strict-aliasing",
)  # fmt: skip


class KernelsHook(BuildHookInterface[Any]):
    """Adds the library to a wheel, and makes the wheel one for this kind of machine."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile beside the source, where an editable installation finds it."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        library = root / LIBRARY
        made = library.with_suffix(".new")  # whoever runs meanwhile has the old one
        compiler = shlex.split(os.environ.get("CC") or "cc")
        command = [*compiler, *FLAGS, "-o", str(made), str(root / SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(library)
        except (OSError, subprocess.CalledProcessError) as exc:
            library.unlink(missing_ok=True)
            why = getattr(exc, "stderr", None) or str(exc)
            self.app.display_warning(f"built without compiled kernels: {why.strip()}")
            return
        build_data["artifacts"].append(f"/{LIBRARY}")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
