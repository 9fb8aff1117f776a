"""Pages in headless Chromium: a probe uses the page as a reader does and writes down what it saw.

A probe is a script that leaves JSON in an element `<pre id="seen">`; errors of the page are in
`window.problems`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

_CATCH = "<script>window.problems = []; onerror = m => window.problems.push(String(m));</script>"
_SEEN = re.compile(r'<pre id="seen">(.*?)</pre>')


def chromium() -> str:
    """Its path; the test is skipped where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium: install it to test the HTML reports")


def what_a_reader_sees(
    page: Path, probe: str, *, folder: Path | None = None, size: str = "390,800"
) -> dict[str, Any]:
    """Open a page from the disk, run the probe, and give what it wrote.

    folder  where the browser may write (default: the page's)
    size    of the window, in pixels; the default is a phone's
    """
    folder = folder or page.parent
    text = page.read_text(encoding="utf-8")
    probed = folder / "probed.html"
    probed.write_text(
        text.replace("<head>", "<head>" + _CATCH).replace("</body>", probe + "</body>"),
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            *(chromium(), "--headless", "--no-sandbox", "--disable-gpu"),
            *("--disable-dev-shm-usage", f"--window-size={size}"),
            *(f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"),
            *("--virtual-time-budget=5000", "--dump-dom", probed.as_uri()),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = _SEEN.search(done.stdout)
    assert found, "the probe wrote nothing"
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen
