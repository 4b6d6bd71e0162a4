"""The bundled model in Transformers.js: in node, in Chromium, and as the page that a person chats with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch

from benchmarks.runners.start import ENVIRONMENTS, MAIN, Output, start
from intaglio.formats.onnx.write import export_onnx
from intaglio.formats.onnx.write_page import export_web
from intaglio.formats.speech import read_speech
from intaglio.formats.texts import CHATS
from intaglio.formats.verify import verify
from intaglio.measure.simulate import decoded_model
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import load_model
from intaglio.packed.model import PackedModel
from intaglio.runs.release import RUNTIMES
from intaglio.tiny import MODEL_DIR
from tests.support.browser import chromium
from tests.support.tiny import pack

pytestmark = pytest.mark.environment

ROOT = Path(__file__).parents[2]
MODULES = ENVIRONMENTS / "transformersjs" / "node_modules"
PROMPT = "It was a bright morning, and the whole family"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return pack(MODEL_DIR, tmp_path_factory.mktemp("packed") / "packed")


@pytest.fixture(scope="module")
def model(packed: PackedModel) -> Any:
    return decoded_model(load_model(MODEL_DIR), packed)


@pytest.fixture(scope="module")
def site(packed: PackedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    export_web(packed, folder, transformers_js=MODULES)
    export_onnx(packed, folder.with_name("onnx"))
    assert verify(packed, folder).exact and verify(packed, folder.with_name("onnx")).exact
    return folder


@torch.no_grad()
def continued(model: Any, ids: list[int], tokens: int) -> list[int]:
    """transformers' greedy tokens, past any end-of-text token."""
    plain = {"do_sample": False, "eos_token_id": None, "temperature": None, "top_p": None, "top_k": None}
    return model.generate(torch.tensor([ids]), max_new_tokens=tokens, **plain)[0, len(ids) :].tolist()


def run(site: Path, runner: str, out: Path, prompt: list[int], tokens: int) -> tuple[Output, np.ndarray]:
    windows = np.array([prompt + list(range(300, 300 + 40 - len(prompt)))])
    artifact = site.with_name("onnx") if runner in ("onnx", "node") else site
    environment = MAIN if runner == "onnx" else "transformersjs"
    return start(runner, environment, artifact, windows, np.array([prompt]), out, tokens), windows


@pytest.mark.parametrize("runner", ["onnx", "node", "wasm"])
def test_the_same_forty_tokens_and_logits_as_in_transformers(
    runner: str, site: Path, model: Any, tmp_path: Path
) -> None:
    prompt = load_tokenizer(MODEL_DIR)(PROMPT)["input_ids"]
    found, windows = run(site, runner, tmp_path / "out", prompt, 40)
    assert found.tokens[0].tolist() == continued(model, prompt, 40)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(windows), use_cache=False).logits[:, :-1].numpy()
    assert np.abs(found.logits - expected).max() < TOLERANCE


def node(folder: Path, onnx: Path, code: str, *arguments: str) -> str:
    """Output of a module that runs in `folder`, beside node_modules and the model as `onnx-model`."""
    folder.mkdir()
    (folder / "onnx-model").symlink_to(onnx)
    (folder / "node_modules").symlink_to(MODULES)
    command = ["node", "--input-type=module", "-e", code, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_documented_command_writes_what_transformers_writes(site: Path, model: Any, tmp_path: Path) -> None:
    """Text in, text out: no ids are passed, so the first token has to come from the folder."""
    code = re.search(r"```js\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    prompt = re.search(r"generate\('(.*?)',", code[1])
    assert prompt is not None
    tokenizer = load_tokenizer(MODEL_DIR)
    ids = torch.tensor([tokenizer(prompt[1])["input_ids"]])
    assert ids[0, 0] == tokenizer.bos_token_id
    assert "add_bos_token" not in json.loads((MODEL_DIR / "tokenizer_config.json").read_text("utf-8"))
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True)
    onnx = site.with_name("onnx")
    assert node(tmp_path / "docs", onnx, code[1]).strip() == expected.strip()
    command = RUNTIMES["onnx"].command.format(path="onnx-model", name="x")  # of a release's README
    released = re.search(r'-e "(.*)"$', command)
    assert released is not None
    said = node(tmp_path / "release", onnx, released[1].replace("'Hello'", repr(prompt[1])))
    assert said.strip() == expected.strip()


FIXED = """
import { env, AutoTokenizer } from '@huggingface/transformers';
import { readFileSync } from 'node:fs';
env.allowRemoteModels = false;
env.localModelPath = './';
const tokenizer = await AutoTokenizer.from_pretrained('onnx-model');
const { texts, chats } = JSON.parse(readFileSync(process.argv[1], 'utf-8'));
const ids = texts.map((text) => Array.from(tokenizer.encode(text), Number));
const written = chats.map(([chat, ask]) =>
  tokenizer.apply_chat_template(chat, { tokenize: false, add_generation_prompt: ask }));
console.log(JSON.stringify({ ids, written }));
"""


def test_the_fixed_texts_and_chats_are_read_and_written_as_by_transformers(
    site: Path, packed: PackedModel, tmp_path: Path
) -> None:
    speech = read_speech(packed.path, packed.plan.model.config)
    assert speech is not None
    texts = speech.texts()
    (tmp_path / "fixed.json").write_text(json.dumps({"texts": texts, "chats": CHATS}), "utf-8")
    found = json.loads(node(tmp_path / "in", site.with_name("onnx"), FIXED, str(tmp_path / "fixed.json")))
    wrong = [text for text, a, b in zip(texts, found["ids"], speech.tokens(texts), strict=True) if a != b]
    assert not wrong
    expected = [
        speech.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask) for chat, ask in CHATS
    ]
    assert found["written"] == expected


def test_webgpu_writes_the_same_tokens(site: Path, model: Any, tmp_path: Path) -> None:
    """On Chromium's software adapter, which takes seconds for a token: so a short prompt, and few of them."""
    prompt = load_tokenizer(MODEL_DIR)(PROMPT)["input_ids"][:6]
    command = [sys.executable, "-c", WEBGPU, str(site), json.dumps(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == continued(model, prompt, 4)


WEBGPU = f"""
import json, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, "benchmarks/runners")
import transformersjs
transformersjs.MODULES = Path({str(MODULES)!r})
runtime = transformersjs.loader("webgpu")(Path(sys.argv[1]))
print(json.dumps(runtime.greedy(np.array(json.loads(sys.argv[2])), 4)))
"""


@contextmanager
def served(*command: str) -> Iterator[str]:
    """The address that a server, started by this command, prints."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            yield re.search(r"http://\S+?:\d+", server.stdout.readline())[0]  # type: ignore[index]
        finally:
            server.terminate()


def use(url: str, pictures: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("page.mjs")
    command = ["node", str(script), str(MODULES), chromium(), url, str(pictures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_person_can_chat_with_it(site: Path, model: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MODEL_DIR)
    question = 'What does "harbor" mean?'
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :]
    with served(sys.executable, str(site / "serve.py"), "0") as url:
        headers = urlopen(url).headers
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        seen = use(f"{url}/?tokens=64", tmp_path)
    assert seen["state"] == "ready" and seen["title"] == "tiny", seen
    assert not seen["elsewhere"] and not seen["errors"]
    assert not seen["sendable"] and seen["busy"] == "busy"
    assert seen["first"].strip() == tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert seen["asked"] == [question, "Tell me about the sea."]
    assert seen["second"].startswith(seen["growing"])
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s", seen["note"])
    assert re.search(r"[\d.]+ tokens/s", seen["figures"])
    told = re.fullmatch(r"[\d.]+ MB", seen["memory"]) is not None
    assert told or seen["memory"] == "not told"  # where the browser refuses to say
    assert len(re.findall(r"[\d.]+ MB", seen["figures"])) == 1 + told
    assert seen["messages"] == 0 and not seen["overflow"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("ready.png", "chat.png", "dark.png"))


def test_a_server_without_the_headers_is_named_as_the_reason(site: Path, tmp_path: Path) -> None:
    plain = "import http.server as h; s = h.ThreadingHTTPServer(('127.0.0.1', 0), h.SimpleHTTPRequestHandler); "
    plain += "print(f'http://127.0.0.1:{s.server_port}', flush=True); s.serve_forever()"
    with served(sys.executable, "-c", f"import os; os.chdir({str(site)!r}); {plain}") as url:
        seen = use(url, tmp_path)
    assert seen["state"] == "failed" and "python serve.py" in seen["status"]
