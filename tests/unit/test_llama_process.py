"""llama.cpp's process may die, hang or talk nonsense at any moment: each ends as one clear error, and nothing is left.

Most of it needs no llama.cpp: a stand-in speaks in its place. What needs the real one is in tests/runtimes.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from intaglio.errors import ConfigError, InputError, RuntimeFailureError
from intaglio.measure import llamacpp, process
from intaglio.measure.llamacpp import LlamaCpp, why_unusable
from tests.support.cli import wait_until
from tests.support.llama import is_alive, library, running, stand_in

WHERE = {
    "start": "while its library was loaded",
    "load": r"while it loaded model\.gguf",
    "decode": "at the first window",
    "rows": "at the first window",
}
ENDS = {
    "SIGSEGV": r"llama\.cpp ended with signal 11 WHERE; see docs/gguf\.md",
    "SIGILL": r"llama\.cpp ended with signal 4 WHERE; it was built for another processor, see docs/gguf\.md",
    "SIGKILL": r"llama\.cpp ended with signal 9 WHERE; systems do this .* when memory runs out",
    "abort": r"llama\.cpp ended with signal 6 WHERE; .*; its last words: ggml\.c:1: GGML_ASSERT\(n > 0\) failed",
    "exception": r"llama\.cpp ended with code 1 WHERE; its last words: .*MemoryError: no room",
    "exit": r"llama\.cpp ended with code 0 WHERE",
    "hang": r"llama\.cpp gave no answer for 0\.\d s WHERE and was stopped; .*INTAGLIO_PATIENCE=10",
    "deaf": r"llama\.cpp gave no answer for 0\.\d s WHERE and was stopped",
    "garbage": r"llama\.cpp answered '\S+ hello' WHERE, which is no answer to '\w+', and was stopped",
    "nesting": r"llama\.cpp answered '\[{200}' WHERE",
    "other": r"llama\.cpp answered '\[\]' WHERE",
    "twice": r"llama\.cpp answered '{\"number\": \d, \"version\": \"\"}' WHERE",
    "flood": r"llama\.cpp answered 'x{200}' WHERE",
    "hang up": r"llama\.cpp hung up WHERE and was stopped",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "END_SECONDS", 0.2)
    monkeypatch.setattr(process, "MOST_BYTES", 1 << 20)


@pytest.mark.parametrize("do", WHERE)
@pytest.mark.parametrize("fate", ENDS)
def test_every_end_is_one_clear_error(
    do: str, fate: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stand_in(monkeypatch, tmp_path / "child", do=do, fate=fate)
    if fate in ("hang", "deaf"):
        monkeypatch.setattr(llamacpp, "work_seconds", lambda *work: 0.6)
        monkeypatch.setattr(llamacpp, "ANSWER_SECONDS", 0.6)
        if do == "start":
            monkeypatch.setattr(llamacpp, "START_SECONDS", 0.6)
    with (
        pytest.raises(RuntimeFailureError, match=ENDS[fate].replace("WHERE", WHERE[do])) as error,
        LlamaCpp(model, threads=1) as llama,
    ):
        llama.logits([2, 5])
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)
    assert running(folder) == []


def test_a_later_window_has_its_number_and_the_failure_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path / "child", do="decode", fate="SIGSEGV", time=3)
    with LlamaCpp(model, threads=1) as llama:
        assert [llama.logits([2, 5]).shape for _ in range(2)] == [(2, llama.vocabulary)] * 2
        with pytest.raises(RuntimeFailureError, match="ended with signal 11 at window 3;"):
            llama.logits([2, 5])
        llama.close()
        with pytest.raises(RuntimeFailureError, match="ended with signal 11 at window 3;"):
            llama.logits([2, 5])


@pytest.mark.parametrize("amx", [False, True])
def test_amx_kernels_are_off_from_the_start_and_it_is_said(
    amx: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "fpu avx512_vnni" + (" amx_bf16 amx_tile amx_int8" if amx else "")
    folder = stand_in(monkeypatch, tmp_path / "child", do="decode", fate="SIGSEGV")
    (folder / "cpuinfo").write_text(f"model name\t: amx_tile\nflags\t\t: {flags} arch_capabilities\n\n" * 2)
    with LlamaCpp(model, threads=1) as llama:
        assert json.loads((folder / "load").read_text())["extra_buffers"] is not amx
        assert ("extra buffers off: the processor has AMX" in llama.version) is amx
        known = "known on processors with AMX, see docs/gguf.md" if amx else "see docs/gguf.md"
        with pytest.raises(RuntimeFailureError, match=f"signal 11 at the first window; {known}$"):
            llama.logits([2, 5])


def test_a_processor_that_says_nothing_has_no_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CPUINFO", tmp_path / "none")
    assert not process.has_amx()


def test_a_forgotten_process_ends_with_its_object(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stand_in(monkeypatch, tmp_path / "child", do="none", fate="exit")
    llama = LlamaCpp(model, threads=1)
    assert len(running(folder)) == 1
    del llama
    assert running(folder) == []


def test_an_interrupted_request_ends_the_process(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer would come later, and be taken for that of the next request."""
    folder = stand_in(monkeypatch, tmp_path / "child", do="decode", fate="hang")
    llama = LlamaCpp(model, threads=1)
    monkeypatch.setattr(process.time, "monotonic", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        llama.logits([2, 5])
    assert running(folder) == []


def test_limits_grow_with_the_work_and_the_users_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = process.work_seconds(10**9), process.work_seconds(18 * 10**9)
    assert 60 < small < large < process.work_seconds(18 * 10**9, 512)
    monkeypatch.setenv(process.PATIENCE, "2.5")
    assert process.read_patience() == 2.5
    for text in ("", "much", "0", "-1", "nan", "inf"):
        monkeypatch.setenv(process.PATIENCE, text)
        with pytest.raises(InputError, match=r"INTAGLIO_PATIENCE='.*': expected a factor"):
            process.read_patience()


def test_a_suspended_run_has_not_run_out_of_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z, an hour later fg: the clock has gone on, the child has not."""
    stand_in(monkeypatch, tmp_path / "child", do="decode", fate="garbage")
    now, hour = time.monotonic, iter(range(0, 10**9, 3600))
    monkeypatch.setattr(process.time, "monotonic", lambda: now() + next(hour))
    with (
        pytest.raises(RuntimeFailureError, match="which is no answer"),
        LlamaCpp(model, threads=1, patience=0.1) as llama,
    ):
        llama.logits([2, 5])


@pytest.mark.parametrize("kind", [OSError(12, "Cannot allocate memory"), BlockingIOError(11, "Try again")])
def test_a_system_that_starts_no_process_is_a_clear_line(
    kind: OSError, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise kind

    stand_in(monkeypatch, tmp_path / "child", do="none", fate="exit")
    open_files = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(RuntimeFailureError, match=rf"llama\.cpp cannot be started: {kind.strerror}"):
        LlamaCpp(model)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_no_shared_memory_is_a_clear_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    folder = stand_in(monkeypatch, tmp_path / "child", do="none", fate="exit")
    monkeypatch.setattr(process.mmap, "mmap", refuse)
    with pytest.raises(RuntimeFailureError, match=r"no shared memory of 67,\d+,\d+ bytes: Cannot allocate memory"):
        LlamaCpp(model)
    assert running(folder) == []


def test_closed_standard_streams_are_no_matter(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket may then have the number of standard input."""
    stand_in(monkeypatch, tmp_path / "child", do="none", fate="exit")
    program = f"""
from pathlib import Path
from intaglio.measure.process import Child
with Child("llama.cpp", Path({str(llamacpp.SCRIPT)!r})) as child:
    memory = child.share(4096)
    answer = child.ask("start", {{"version": str}}, seconds=60, where="now")
    Path({str(tmp_path / "answer")!r}).write_text(answer["version"])
"""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, program], check=True)
    assert (tmp_path / "answer").read_text() == "0.0"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_the_runtimes_failure(
    value: float, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path / "child", do="none", fate="exit")
    with LlamaCpp(model) as llama:
        llama.logits([2, 5])
        llama._shared_RV[1, 7] = value
        with pytest.raises(RuntimeFailureError, match=r"model\.gguf: llama\.cpp computed NaN or Inf at window 2"):
            llama.logits([2, 5])


# The real child, with a library in place of llama-cpp-python

LIBRARIES = {
    "broken": ("raise RuntimeError('Failed to load shared library: libgomp.so.1')", r"RuntimeError: Failed to load sh"),
    "absent": ("raise ImportError('no module named numpy')", r"ImportError: no module named numpy"),
    "syntax": ("def", r"SyntaxError: "),
    "deadly": (
        "import os; os.kill(os.getpid(), 4)",
        r"ended with signal 4 while its library was loaded; it was built for another processor",
    ),
    "loud": ("print('x' * 10_000); import os; os.system('echo loud'); os.abort()", "ended with signal 6 while its lib"),
}


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_library_that_cannot_be_loaded_says_why(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text, message = LIBRARIES[kind]
    library(monkeypatch, tmp_path, text)
    reason = why_unusable()
    assert reason is not None and re.search(message, reason)
    with pytest.raises((InputError, RuntimeFailureError), match=message):
        LlamaCpp(model)
    assert capfd.readouterr() == ("", "")


def test_the_advice_names_the_version_that_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, tmp_path, "raise OSError('libllama.so: cannot open shared object file')")
    pinned = re.search(r"llama-cpp-python==[\d.]+", Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    assert pinned and f"pip install --force-reinstall --no-cache-dir --no-deps {pinned[0]}" in str(why_unusable())


def test_no_library_names_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "installed", lambda: False)
    assert "pip install 'intaglio[llama]'" in str(why_unusable())
    with pytest.raises(InputError, match=r"pip install 'intaglio\[llama\]'"):
        LlamaCpp(model)
    with pytest.raises(ConfigError, match="no such file"):
        LlamaCpp(model.with_name("none.gguf"))


PARENT = """
import time
from pathlib import Path
from intaglio.measure import process
child = process.Child("llama.cpp", Path(process.__file__).with_name("llama_child.py"))
print(child.pid, flush=True)
{then}
"""
# a request that never ends; nothing asked yet; ends while a fork of it lives on
PARENTS = {
    "busy": "child.ask('start', {}, seconds=600, where='now')",
    "idle": "time.sleep(600)",
    "forked": "import os; os.fork() or time.sleep(8); time.sleep(600)",
}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", PARENTS)
def test_the_process_ends_with_its_parent(kind: str, how: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, tmp_path, "import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with subprocess.Popen(
        [sys.executable, "-c", PARENT.format(then=PARENTS[kind])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell starts background jobs with SIGINT ignored, and the child would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        if how == signal.SIGINT:
            os.killpg(parent.pid, how)  # as a terminal does it
        else:
            parent.send_signal(how)
        parent.wait(120)
        if how == signal.SIGINT:
            # a fork writes its own traceback into the same stream, and their ends of lines may change places
            assert "".join(parent.stderr.read().split()).endswith("KeyboardInterrupt")
        wait_until(lambda: not is_alive(pid))
        if kind == "forked" and how != signal.SIGINT:
            os.killpg(parent.pid, signal.SIGKILL)
