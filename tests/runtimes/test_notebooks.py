"""Each notebook runs from top to bottom, on the bundled model, in a kernel of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.environment


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat  # of dev, and slow to import
    from nbclient import NotebookClient

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    said = [
        output.get("text", "") or output.get("data", {}).get("text/html", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") != "stderr"
    ]
    printed = "\n".join(said)
    assert re.search(r"^QAT recovers \d+% of what Q4_0 rounding loses", printed, re.M)
    assert "<iframe srcdoc=" in printed and "0 bits differ" in printed
    assert len(said[-2].split()) > 12  # what llama.cpp wrote
    assert {"qat-run", "release"} <= {found.name for found in tmp_path.iterdir()}
