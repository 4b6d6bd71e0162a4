"""Headless Chromium: for pages that need no driver."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-headless-shell", "google-chrome")


def chromium() -> str:
    """The browser on PATH; the test fails without one."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.fail(f"no browser: expected one of {', '.join(NAMES)} on PATH: apt-get install chromium")
    return found


def run_browser(url: str, folder: Path, *flags: str) -> str:
    """What Chromium prints of a page, as the flags ask; its profile is in `folder`."""
    settings = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'user'}",
    )
    command = [chromium(), *settings, *flags, url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout
