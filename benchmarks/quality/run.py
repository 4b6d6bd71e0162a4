"""Make the artifacts of the quality table, each method in a process and an environment of its own.

    python benchmarks/quality/texts.py MODEL WORK
    python benchmarks/quality/run.py MODEL WORK               every method that WORK does not have yet
    python benchmarks/quality/run.py MODEL WORK --only hqq    some of them
    python benchmarks/quality/measure.py MODEL WORK --out FILE --table PAGE

MODEL is a transformers folder: src/intaglio/tiny/model, or that of Gemma 3 270M that `benchmarks/gemma3_270m.py` leaves.
The environments are folders of INTAGLIO_PEERS (default .peers); each is made from requirements/NAME.txt when it is
first needed. A method that fails leaves its error in WORK/methods/NAME/failure.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from methods import MAIN, METHODS, Method

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("INTAGLIO_PEERS", HERE.parents[1] / ".peers"))


def python_of(environment: str) -> Path:
    """The interpreter of an environment, which is made if it is missing."""
    if environment == MAIN:
        return Path(sys.executable)
    folder = ENVIRONMENTS / environment
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pinned = HERE / "requirements" / f"{environment}.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", pinned], check=True)
    return python


def make(name: str, method: Method, model: Path, work: Path) -> bool:
    """Run one method; False if it failed."""
    out = work / "methods" / name
    source = work / "methods" / method.latents_of / "latents" if method.latents_of else model
    command = [python_of(method.environment), HERE / f"{method.script}.py", source, work, out, *method.options]
    clean = {k: v for k, v in os.environ.items() if method.environment == MAIN or not k.startswith("PYTHON")}
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run([*map(str, command)], env=clean, capture_output=True, text=True, check=False)
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text(done.stdout + done.stderr, "utf-8")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        errors = [text for text in lines if re.match(r"[\w.]*(Error|Exception)\b", text)]  # a progress bar may be last
        (out / "failure.txt").write_text((errors or lines)[-1] + "\n", "utf-8")
    return not done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args()
    for name in options.only:
        if not (options.work / "methods" / name / "artifact.json").is_file():
            print(name, "made" if make(name, METHODS[name], options.model, options.work) else "FAILED", flush=True)


if __name__ == "__main__":
    main()
