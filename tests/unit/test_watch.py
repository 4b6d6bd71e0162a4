"""The page of a run that is watched: what it says of each state, who may ask for it, and how it lives in a browser."""

from __future__ import annotations

import html
import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from intaglio.errors import ConfigError, InputError
from intaglio.measure import watch_page
from intaglio.measure.watch_page import Watched, rendered
from intaglio.runs import watch as watching
from intaglio.runs.watch import serve, watch
from tests.support.browser import run_browser
from tests.support.cli import intaglio
from tests.support.watched import STEP_TOKENS, TAIL, TOTAL, add_step, hold, make_run


def head(folder: Path) -> str:
    """The text of the page's head, without tags."""
    parts = rendered(Watched(folder))["parts"]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", parts["head"])).split())


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """The port of a server that shows the folder."""
    with serve(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, path: str = "/", host: str | None = None, method: str = "GET") -> tuple[int, Any, str]:
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    if host != "":
        connection.putheader("Host", host or f"localhost:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


# What it says


def test_a_run_in_training(tmp_path: Path) -> None:
    hold(make_run(tmp_path / "my run", 12))
    state = rendered(Watched(tmp_path / "my run"))
    assert state["title"] == f"Step 12 of {TOTAL}: my run"
    figures = state["figures"]
    assert figures["tokens_per_s"] == 2 * STEP_TOKENS and figures["seconds_left"] == (TOTAL - 12) / 2
    assert figures["held_out_loss"] == 1.5 / 10 and figures["codes_changed"] == 0.012
    said = head(tmp_path / "my run")
    assert f"Step 12 of {TOTAL} my run , recipe q4_0: 768 of 2.56 k tokens" in said
    assert "time left 14 s" in said and "held-out loss 0.1500 first 0.7500" in said and "codes changed 1.20%" in said
    assert "memory 3.22 GB host, at the peak" in said and f"codes stand still from step {TAIL + 1} on" in said
    assert state["parts"]["charts"].count("<figure") == 6
    assert "process 7: intaglio train" in state["parts"]["log"] and not state["parts"]["samples"].strip()


def test_memory_of_a_gpu_stands_beside_the_plans(tmp_path: Path) -> None:
    make_run(tmp_path, 3, gpu_bytes=67_100_000_000, planned_bytes=66_000_000_000)
    assert "memory 67.1 GB planned 66 GB; host 3.22 GB" in head(tmp_path)
    make_run(tmp_path / "drafter", 3, gpu_bytes=67_100_000_000, planned_bytes=0)
    assert "memory 67.1 GB host 3.22 GB" in head(tmp_path / "drafter")


@pytest.mark.parametrize(
    ("steps", "log", "held", "said"),
    [
        (0, "Fitting", True, "Getting ready"),
        (1, "Training", True, f"Step 1 of {TOTAL}"),
        (TOTAL, "Packing", True, "Trained; files and measurements follow .* training took 20 s"),
        (TOTAL, "done", False, f"Finished after {TOTAL} steps .* training took 20 s"),
        (9, "ended: TrainingError: loss is nan at step 10", False, "Stopped at step 9 of 40 .* loss is nan at step 10"),
        (9, "ended: Stopped: ", False, "Stopped at step 9 of 40 .*--resume goes on from the last checkpoint"),
        (9, "Training", False, "Stopped at step 9 of 40 .* No process works in this folder"),
        (0, "Reading text", False, "Stopped before the first step .* No process works in this folder"),
    ],
    ids=["before", "first step", "packing", "finished", "failed", "signal", "killed", "killed before"],
)
def test_each_state_has_its_headline(steps: int, log: str, held: bool, said: str, tmp_path: Path) -> None:
    make_run(tmp_path, steps, log=log)
    if held:
        hold(tmp_path)
    assert re.match(said, head(tmp_path))


def test_a_lock_of_a_process_that_is_gone_says_so(tmp_path: Path) -> None:
    hold(make_run(tmp_path, 2), pid=2**22 + 1)
    assert rendered(Watched(tmp_path))["figures"]["state"] == "left"


def test_a_run_that_has_only_its_lock_is_getting_ready(tmp_path: Path) -> None:
    hold(tmp_path)
    assert head(tmp_path).startswith("Getting ready")


def test_a_drafters_run_shows_the_stage_that_began_last(tmp_path: Path) -> None:
    hold(tmp_path)
    for number, name in enumerate(("float", "quantized"), 1):
        make_run(tmp_path / name, 5 * number)
        assert head(tmp_path).startswith(f"Step {5 * number} of")


def test_a_step_that_was_done_twice_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path, 3)
    lines = (tmp_path / "speed.jsonl").read_text()
    (tmp_path / "speed.jsonl").write_text(lines + lines.splitlines(keepends=True)[-1])
    (curve,) = [c for c in Watched(tmp_path).look().curves() if c.title == "Speed"]
    assert curve.dots.count("M") == 3


def test_logs_are_read_again_only_when_they_grow(tmp_path: Path) -> None:
    watched = Watched(make_run(tmp_path, 3))
    with patch.object(watch_page, "read_losses", wraps=watch_page.read_losses) as read:
        assert [len(watched.look().rows), len(watched.look().rows), read.call_count] == [3, 3, 1]
        add_step(tmp_path, 4)
        assert [len(watched.look().rows), read.call_count] == [4, 2]


def test_the_samples_of_a_finished_run_are_shown(tmp_path: Path) -> None:
    make_run(tmp_path, TOTAL, log="done")
    sample = {"prompt": "Once <b>", "continuations": {"QAT": " upon a time"}}
    (tmp_path / "report.json").write_text(json.dumps({"samples": [sample]}))
    part = rendered(Watched(tmp_path))["parts"]["samples"]
    assert "Once &lt;b&gt;" in part and ">upon a time<" in part


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("losses.jsonl", '{"step": 9}\n', r"losses\.jsonl:1: not a line of a run's log"),
        ("run.json", "[]", r"run\.json: expected a JSON object"),
        ("run.json", '{"plan": "x"}', r"run\.json: recipe"),
        ("report.json", '{"samples": 3}', r"report\.json: not a report"),
    ],
)
def test_a_damaged_run_is_an_error_first_and_a_page_later(name: str, content: str, says: str, tmp_path: Path) -> None:
    watched = Watched(make_run(tmp_path, 3, log="done"))
    assert watched.look().rows
    (tmp_path / name).write_text(content)
    outcome = intaglio("watch", tmp_path)
    assert outcome.code == 2 and re.search(says, outcome.error)
    state = rendered(watched)
    assert state["figures"] == {"state": "broken"} and "cannot be read" in state["parts"]["head"]
    assert re.search(says, html.unescape(state["parts"]["head"]))


def test_a_folder_that_goes_away_is_said_on_the_page(tmp_path: Path) -> None:
    watched = Watched(make_run(tmp_path / "run", 3))
    (tmp_path / "run").rename(tmp_path / "gone")
    assert rendered(watched)["figures"]["state"] == "left"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "nowhere", "no such folder"), (tmp_path, r"holds no run: expected run\.json")):
        outcome = intaglio("watch", path)
        assert outcome.code == 2 and re.search(says, outcome.error)
    with pytest.raises(InputError, match="no such folder"):
        watch(__file__)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = intaglio("watch", tmp_path, "--port", port)
    assert outcome.code == 2 and re.search(rf"port {port}: cannot be served: .*--port", outcome.error)
    with pytest.raises(InputError, match="port 99999: cannot be served"):
        serve(tmp_path, 99999)


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    with patch.object(watching.ThreadingHTTPServer, "serve_forever", side_effect=KeyboardInterrupt):
        outcome = intaglio("watch", tmp_path, "--port=0")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.fullmatch(rf"http://localhost:\d+ shows {tmp_path}\. Ctrl-C ends it\.\n", outcome.out)


# Who may ask, and for what


def test_it_listens_to_this_machine_alone(tmp_path: Path) -> None:
    with serve(make_run(tmp_path, 1), 0) as server:
        assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:8420", "[::1]:80"])
def test_its_own_names_are_answered_at_any_port(host: str, tmp_path: Path) -> None:
    """ssh may forward another port to ours."""
    with served(make_run(tmp_path, 1)) as port:
        assert ask(port, host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["", "evil.example", "localhost.evil.example", "evil.example:8420", "127.0.0.1@evil:80"]
)
@pytest.mark.parametrize("path", ["/", "/state.json", "/run.json"])
def test_foreign_names_that_lead_here_are_refused(host: str, path: str, tmp_path: Path) -> None:
    with served(make_run(tmp_path / "secret name", 1)) as port:
        status, _, text = ask(port, path, host)
    assert status == 403 and "secret name" not in text


@pytest.mark.parametrize(
    "path", ["/run.json", "/losses.jsonl", "/../run.json", "/%2e%2e/run.json", "//etc/passwd", "/state.json/..", "*"]
)
def test_nothing_but_the_page_and_its_json_is_served(path: str, tmp_path: Path) -> None:
    with served(make_run(tmp_path, 1)) as port:
        status, _, text = ask(port, path)
    assert status == 404 and text == "there are / and /state.json\n"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_sent(method: str, tmp_path: Path) -> None:
    with served(make_run(tmp_path, 1)) as port:
        assert ask(port, method=method)[0] == 501


def test_no_page_of_elsewhere_can_read_or_frame_it(tmp_path: Path) -> None:
    with served(make_run(tmp_path, 1)) as port:
        for path in ("/", "/state.json"):
            status, headers, text = ask(port, path)
            assert status == 200 and not [name for name in headers if name.lower().startswith("access-control")]
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["Cache-Control"] == "no-store"
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert ask(port, method="HEAD")[2] == "" and json.loads(text)["figures"]["step"] == 1
        page = ask(port)[2]
    (nonce,) = re.findall(r'<script nonce="([\w-]+)">', page)
    assert len(nonce) > 16 and not re.search(r"(src|href)=|url\(|@import", page.replace('href="#ring', ""))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\u202e"
    make_run(tmp_path / "<b>", 2, log=f"ended: TrainingError: {evil}")
    state = rendered(Watched(tmp_path / "<b>"))
    for part in state["parts"].values():
        assert "<img" not in part and "\u202e" not in part
    assert "&lt;img" in state["parts"]["head"] and "&lt;b&gt;" in state["parts"]["head"]


def test_python_names_the_same_errors(tmp_path: Path) -> None:
    (make_run(tmp_path, 1) / "losses.jsonl").write_text("{\n")
    with pytest.raises(ConfigError, match=r"losses\.jsonl:1"):
        watch(tmp_path)


# In a browser


@pytest.mark.browser
def test_the_page_is_live(tmp_path: Path) -> None:
    """Each look adds a step; the page that was opened at step 3 shows later ones, and the charts have grown."""
    folder = make_run(tmp_path / "run", 3)
    hold(folder)
    looks: list[int] = []

    def look(watched: Watched) -> dict[str, Any]:
        looks.append(1)
        if len(looks) > 1:
            add_step(folder, 2 + len(looks))
        return rendered(watched)

    with patch.object(watching, "rendered", look), served(folder) as port:
        dom = run_browser(f"http://localhost:{port}", tmp_path, "--virtual-time-budget=9000", "--dump-dom")
    steps = int(re.search(r"<h1>Step (\d+) of 40</h1>", dom)[1])  # type: ignore[index]
    assert steps >= 5 and f"<title>Step {steps} of 40: run</title>" in dom
    assert 'data-connection="on"' in dom
    assert max(path.count("h0") for path in re.findall(r'class="dots" d="([^"]*)"', dom)) == steps


@pytest.mark.browser
def test_the_page_fits_every_width(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "a folder with a very long name that never ends", 12, gpu_bytes=1e11, planned_bytes=1e11
    )
    hold(folder)
    with served(folder) as port:
        page = ask(port)[2]
    page = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    widths = (320, 390, 600, 761, 900, 981, 1280)
    frames = "".join(f'<iframe width="{w}" height="800" srcdoc="{html.escape(page)}"></iframe>' for w in widths)
    measure = (
        "onload = () => document.title = [...document.querySelectorAll('iframe')].map(f => "
        "f.contentDocument.documentElement.scrollWidth).join(' ')"
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html>{frames}<script>{measure}</script>", "utf-8")
    found = re.search(r"<title>([\d ]+)</title>", run_browser(wrapper.as_uri(), tmp_path, "--dump-dom"))
    assert found and [int(width) for width in found[1].split()] == list(widths)
