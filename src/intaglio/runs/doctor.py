"""Facts about this machine: processor, GPUs, packages, runtimes, and what each verb can do with them.

Nothing native is loaded here. `doctor_trial` loads it in a process of its own, and may die.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from intaglio.measure.process import CPUINFO, START_SECONDS, ending, hanging, has_amx, read_log, read_patience

FINE, MISSING, FAULT = "fine", "missing", "fault"
MACHINE, PACKAGES, RUNTIMES, VERBS = "Machine", "Packages", "Runtimes", "Verbs"
TRIED = ("torch", "transformers", "llama.cpp")  # by doctor_trial, in this order
TRIAL = "intaglio.runs.doctor_trial"
TRIAL_SECONDS, VERSION_SECONDS = 5 * START_SECONDS, 10.0
NUMBER = re.compile(r"\d+(?:\.\d+)+|(?<=version: )\d+")
NVIDIA = Path("/proc/driver/nvidia/version")
AMX = "llama.cpp's kernels for AMX crash where gcc 12 built them; they are off here, see docs/gguf.md"
# Verb, a thing that it does, and the extra that this needs, or the compiler.
USES = (
    ("plan, inspect, data", "everything", ""),
    ("convert, verify, watch, release", "everything", ""),
    ("quantize", "on {device}", ""),
    ("quantize", "--images", "vision"),
    ("train", "on {device}", ""),
    ("train", "--compile", "c++"),
    ("train", "--track wandb", "wandb"),
    ("train", "--track trackio", "trackio"),
    ("train", "--track tensorboard", "tensorboard"),
    ("train", "--track mlflow", "mlflow"),
    ("train", "schedule.lora_rank", "lora"),
    ("train", "schedule.moments='int8'", "lean"),
    ("train-drafter", "on {device}", ""),
    ("export", "gguf, hf, gemma-mobile, vllm, mlx, ollama, lmstudio", ""),
    ("export", "onnx, web", "onnx"),
    ("eval, report, chat", "folders in transformers", ""),
    ("eval, report, chat", "folders that `export vllm` wrote", "vllm"),
    ("eval, report, chat", ".gguf in llama.cpp", "llama"),
    ("eval, report, chat", "--tasks", "tasks"),
)
# Runtimes that intaglio does not start: a package or a program, and where to get it.
OTHERS = (
    ("llama-server", "", "llama-server", "for drafters: docs/gguf.md says how to build it"),
    ("vLLM", "vllm", "vllm", "pip install vllm, in an environment of its own"),
    ("MLX", "mlx-lm", "mlx_lm.generate", "pip install mlx-lm, in an environment of its own"),
    ("ONNX Runtime", "onnxruntime", "", "pip install onnxruntime"),
    ("LiteRT-LM", "litert-lm", "litert-lm", "for `export litert` too: docs/litert.md"),
    ("Node.js", "", "node", "for Transformers.js: nodejs.org"),
    ("Ollama", "", "ollama", "ollama.com"),
)
KNOWN = {  # faults of packages that we have met, from a version on
    "transformers": ("5.23", "refuses mobile folders with per-layer embeddings: docs/mobile.md has two ways around it"),
    "vllm": ("0.32", "merges output scales, which costs 0.1 nats on the mobile recipe: docs/vllm.md"),
}


@dataclass(frozen=True)
class Fact:
    """Something about this machine.

    state: FINE where it is here, MISSING where it could be, FAULT where it is broken. found: its version or figures.
    advice: what to install or to know; empty where there is nothing to do.
    """

    section: str
    name: str
    state: str
    found: str
    advice: str = ""


def doctor() -> list[Fact]:
    """Everything that is known of this machine, a fact each, in order of sections."""
    tried = _trial()
    packages = list(_packages())
    return [*_machine(tried), *packages, *_runtimes(tried), *_verbs(tried, packages)]


def _trial() -> dict[str, dict[str, Any]]:
    """Answers of the trial by name: "found", or the "fault" that it met, died of or hung at."""
    answers: dict[str, dict[str, Any]] = {}
    seconds = TRIAL_SECONDS * read_patience()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        command = [sys.executable, "-P", "-m", TRIAL, folder]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
        try:
            out, _ = process.communicate(timeout=seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            out, code = process.communicate()[0], None
        for line in out.splitlines():
            if line.startswith(b'{"name": '):  # a library may print anything else
                answer = json.loads(line)
                answers[answer["name"]] = answer
        for name in [name for name in TRIED if name not in answers][:1]:
            where = f"while {name} was tried"
            died = hanging(name, seconds, where) if code is None else ending(name, code, where, read_log(log))
            answers[name] = {"fault": died}
    return answers


def _machine(tried: dict[str, dict[str, Any]]) -> Iterator[Fact]:
    yield Fact(MACHINE, "Python", FINE, f"{platform.python_version()}, {platform.system()}")
    lines = CPUINFO.read_text("utf-8", "replace").splitlines() if CPUINFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = f"{next(names, platform.machine())}, {os.cpu_count()} cores"
    yield Fact(MACHINE, "processor", FINE, processor, AMX if has_amx() else "")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Fact(MACHINE, "memory", FINE, f"{memory / 1e9:.0f} GB")
    yield Fact(MACHINE, "disk", FINE, f"{shutil.disk_usage('.').free / 1e9:.0f} GB free in this folder")
    yield from _gpus(tried["torch"])
    compiler = shutil.which("c++")
    yield Fact(MACHINE, "C++ compiler", *((FINE, compiler) if compiler else (MISSING, "none", "install g++ or clang")))


def _gpus(torch: dict[str, Any]) -> Iterator[Fact]:
    gpus = torch.get("gpus", [])
    for gpu in gpus:
        yield Fact(MACHINE, "GPU", FINE, f"{gpu['name']}, {gpu['bytes'] / 1e9:.0f} GB")
    if not gpus and NVIDIA.is_file():
        advice = "the NVIDIA driver is here, but torch finds no GPU: install torch for CUDA, see pytorch.org"
        yield Fact(MACHINE, "GPU", FAULT, f"none for torch {_version('torch')}", advice)
    elif not gpus:
        yield Fact(MACHINE, "GPU", MISSING, "none", "models compute on the processor")


def _packages() -> Iterator[Fact]:
    """intaglio, what it must have, and a row for each extra of USES."""
    own = _version("intaglio")
    yield Fact(PACKAGES, "intaglio", *((FINE, own) if own else (FAULT, "not installed", "pip install intaglio")))
    wanted = [Requirement(line) for line in (own and requires("intaglio")) or []]
    for need in wanted:
        state, found = _fits(need)
        if not need.marker and state != FINE:
            yield Fact(PACKAGES, need.name, FAULT, found, f"pip install '{need.name}{need.specifier}'")
        elif not need.marker and need.name in TRIED:
            yield Fact(PACKAGES, need.name, FINE, _version(need.name), _known(need.name))
    for extra in dict.fromkeys(extra for _, _, extra in USES if extra not in ("", "c++")):
        fits = [_fits(need) for need in wanted if need.marker and need.marker.evaluate({"extra": extra})]
        state = next((state for state, _ in fits if state != FINE), FINE if fits else MISSING)
        found = ", ".join(found for _, found in fits) or "newer than the installed intaglio"
        yield Fact(PACKAGES, f"[{extra}]", state, found, "" if state == FINE else f"pip install 'intaglio[{extra}]'")


def _fits(need: Requirement) -> tuple[str, str]:
    """Whether a package is here in a version that we work with, and which."""
    found = _version(need.name)
    if not found:
        return MISSING, f"no {need.name}"
    if not need.specifier.contains(found, prereleases=True):
        return FAULT, f"{need.name} {found}, not {need.specifier}"
    return FINE, f"{need.name} {found}"


def _known(name: str) -> str:
    """The fault that we know of the installed version of a package."""
    since, fault = KNOWN.get(name, ("", ""))
    return fault if since and Requirement(f"{name}>={since}").specifier.contains(_version(name)) else ""


def _version(name: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _runtimes(tried: dict[str, dict[str, Any]]) -> Iterator[Fact]:
    for name in TRIED[1:]:
        answer = tried.get(name, {"missing": "not tried, since the trial ended before"})
        state = next(kind for kind in ("found", FAULT, MISSING) if kind in answer)
        said, advice = answer[state], answer.get("advice", "")
        if state == "found":
            yield Fact(RUNTIMES, name, FINE, said, advice)
        else:
            yield Fact(RUNTIMES, name, *((FAULT, "does not run", said) if state == FAULT else (MISSING, said, advice)))
    for name, package, program, advice in OTHERS:
        found = (package and _version(package)) or (program and _program_version(program))
        yield Fact(RUNTIMES, name, *((FINE, found, _known(package)) if found else (MISSING, "not here", advice)))


def _program_version(program: str) -> str:
    """The version that a program tells, or else its path; empty if it is not on the PATH."""
    path = shutil.which(program) or ""
    if not path:
        return ""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=VERSION_SECONDS, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return path
    number = NUMBER.search(done.stdout + done.stderr)
    return number[0] if number else path


def _verbs(tried: dict[str, dict[str, Any]], packages: list[Fact]) -> Iterator[Fact]:
    """Each verb with the things that it does here, and with what it needs for the rest."""
    broken = next((name for name in TRIED[:2] if FAULT in tried.get(name, {})), "")
    gpus = tried["torch"].get("gpus", [])
    device = f"{len(gpus)} x {gpus[0]['name']}" if gpus else "the processor"
    there = {fact.name for fact in packages if fact.state == FINE} | {"[]"}
    there |= {"[c++]"} if shutil.which("c++") else set()
    there -= {"[llama]"} if FAULT in tried.get("llama.cpp", {}) else set()
    for verb in dict.fromkeys(verb for verb, _, _ in USES):
        parts = [(what.format(device=device), f"[{extra}]") for name, what, extra in USES if name == verb]
        can = "; ".join(what for what, extra in parts if extra in there)
        cannot = "; ".join(f"{what} {extra}" for what, extra in parts if extra not in there)
        if broken:
            yield Fact(VERBS, verb, FAULT, "nothing", f"{broken} does not run")
        else:
            yield Fact(VERBS, verb, FINE, can, f"not {cannot}" if cannot else "")
