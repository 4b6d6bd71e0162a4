"""Tasks of lm-evaluation-harness: an artifact's log-probabilities against lm_eval's own model class, and scores."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from intaglio.errors import InputError
from intaglio.measure import tasks as tasks_module
from intaglio.measure.harness import Harness
from intaglio.measure.tasks import Asking, TaskScore, evaluate_tasks
from tests.support.cases import Case
from tests.support.cli import intaglio

pytestmark = pytest.mark.runtime

QUESTIONS = [
    {"q": f"The {name} swam past the", "choices": ["ship", "house by the sea", "of"], "answer": number % 3}
    for number, name in enumerate(("whale", "dog", "captain", "boy", "moon", "sea"))
]
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITING = """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "ship"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task files by name, and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    made = {}
    for name, text in {"choices": CHOICES, "writing": WRITING, "rolling": ROLLING}.items():
        made[name] = folder / f"{name}.yaml"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {folder / 'data.jsonl'}}}\n"
        made[name].write_text(f"{head}test_split: train\n{text}")
    return made


@pytest.fixture(scope="module")
def models(cases: dict[str, Case]) -> Iterator[dict[str, Any]]:
    """The same weights in llama.cpp and in transformers, by our class and by lm_eval's own."""
    case = cases["gemma4"]
    theirs = HFLM(pretrained=str(case.hf), device="cpu", dtype="float32", batch_size=2)
    with (
        closing(Harness(case.gguf, context_tokens=128, device="cpu")) as gguf,
        closing(Harness(case.hf, context_tokens=128, device="cpu")) as hf,
    ):
        yield {"gguf": gguf, "hf": hf, "theirs": theirs}


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=argument) for argument in arguments]


PAIRS = requests(
    *((row["q"], f" {choice}") for row in QUESTIONS for choice in row["choices"]),
    ("", "A text without a context"),
    ("Spaces at its end  ", "move"),
)


def test_log_probabilities_are_those_of_lm_eval_s_own_class(models: dict[str, Any]) -> None:
    found = {name: model.loglikelihood(PAIRS) for name, model in models.items()}
    theirs, hf, gguf = (torch.tensor([score for score, _ in found[name]]) for name in ("theirs", "hf", "gguf"))
    torch.testing.assert_close(hf, theirs, atol=2e-4, rtol=0)
    assert [likeliest for _, likeliest in found["hf"]] == [likeliest for _, likeliest in found["theirs"]]
    tokens = torch.tensor([len(models["hf"].tok_encode(request.args[1])) for request in PAIRS])
    assert 0 < ((gguf - hf).abs() / tokens).max() < 0.1  # llama.cpp rounds activations to 8 bits


def test_whole_texts_are_scored_in_windows(models: dict[str, Any]) -> None:
    text = "The whale swam past the ship, and nobody on it said a word. " * 12
    for texts in (requests(("A short text.",)), requests((text,))):
        ours, gguf = (models[name].loglikelihood_rolling(texts)[0] for name in ("hf", "gguf"))
        assert gguf == pytest.approx(ours, rel=0.01)
        if texts[0].args[0] != text:  # lm_eval's own class reads the first token twice in whole texts
            whole = requests(("", texts[0].args[0]))
            assert ours == pytest.approx(models["theirs"].loglikelihood(whole)[0][0], abs=2e-4)
    assert len(models["hf"].tok_encode(text)) > models["hf"].engine.context_tokens


def test_choices_of_one_token_are_one_reading(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, read = models["hf"].engine, []
    plain = engine.logits
    monkeypatch.setattr(engine, "logits", lambda tokens, last=None: read.append(len(tokens)) or plain(tokens, last))
    models["hf"].loglikelihood(requests(*(("Answer:", f" {choice}") for choice in ("A", "B", "C", "D"))))
    assert len(read) == 1


def test_texts_are_written_up_to_an_end(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def write(engine: Any, tokens: list[int], most: int, temperature: float) -> Iterator[str]:
        assert (most, temperature) == (9, 0.5)
        yield from ("no", "not so", "not so. And", "never asked for")

    settings = {"until": [".", "x"], "max_gen_toks": 9, "do_sample": True, "temperature": 0.5}
    with monkeypatch.context() as patched:
        patched.setattr("intaglio.measure.harness.written", write)
        assert models["hf"].generate_until(requests(("Who?", settings))) == ["not so"]
    greedy = requests(("The whale", {"until": "no such end", "max_gen_toks": 5, "top_p": 0.9}))
    assert models["hf"].generate_until(greedy) == models["theirs"].generate_until(
        [SimpleNamespace(args=(q, {"until": ["no such end"], "max_gen_toks": 5})) for q, _ in (r.args for r in greedy)]
    )
    for odd in ({"do_sample": True, "top_p": 0.9}, {"num_beams": 4}):
        with pytest.raises(InputError, match="generation_kwargs"):
            models["hf"].generate_until(requests(("Who?", odd)))


def test_chats_are_put_into_the_model_s_own_template(models: dict[str, Any]) -> None:
    chat = [{"role": "user", "content": "Who swam?"}]
    expected = models["theirs"].apply_chat_template(chat)
    for name in ("gguf", "hf"):
        assert models[name].apply_chat_template(chat) == expected
        assert models[name].tok_encode(expected) == models["theirs"].tok_encode(expected)


def test_it_is_a_model_that_lm_eval_knows_by_name(gemma4: Case, files: dict[str, Path]) -> None:
    assert get_model("intaglio") is Harness
    options = f"path={gemma4.gguf},context_tokens=64"
    manager = TaskManager(include_defaults=False)  # else it reads 14,000 files
    task = str(files["choices"])
    results = simple_evaluate(model="intaglio", model_args=options, tasks=[task], task_manager=manager, limit=2)
    assert results["n-samples"]["choices"]["effective"] == 2


# Scores


@pytest.fixture(scope="module")
def scores(cases: dict[str, Case], files: dict[str, Path]) -> list[TaskScore]:
    case = cases["gemma4"]
    names = [str(files[name]) for name in ("choices", "rolling")]
    return evaluate_tasks(case.gguf, case.checkpoint, names, Asking(context_tokens=128), device="cpu")


def test_scores_have_errors_and_the_original_beside_them(scores: list[TaskScore], cases: dict[str, Case]) -> None:
    found = {(score.task, score.metric): score for score in scores}
    assert set(found) == {("choices", "acc"), ("choices", "acc_norm"), ("rolling", "word_perplexity")}
    accuracy = found["choices", "acc"]
    assert (accuracy.samples, accuracy.higher_is_better) == (6, True) and "llama.cpp" in accuracy.runtime
    answers = {}
    for name, path in (("score", cases["gemma4"].gguf), ("original_score", cases["gemma4"].checkpoint)):
        with closing(Harness(path, context_tokens=128, device="cpu")) as model:
            sums = torch.tensor([score for score, _ in model.loglikelihood(PAIRS[:18])]).view(6, 3)
        right = [float(best == row["answer"]) for best, row in zip(sums.argmax(1).tolist(), QUESTIONS, strict=True)]
        answers[name] = right
        assert getattr(accuracy, name) == pytest.approx(statistics.mean(right))
        stderr = accuracy.stderr if name == "score" else accuracy.original_stderr
        assert stderr == pytest.approx(statistics.stdev(right) / 6**0.5)
    pairs = [a - b for a, b in zip(*answers.values(), strict=True)]
    assert accuracy.difference_stderr == pytest.approx(statistics.stdev(pairs) / 6**0.5)
    perplexity = found["rolling", "word_perplexity"]
    assert not perplexity.higher_is_better and perplexity.difference_stderr is None
    assert perplexity.recovered == pytest.approx(perplexity.original_score / perplexity.score)


def results(scores: dict[str, float], **answers: tuple[float, ...]) -> dict[str, Any]:
    """lm_eval's results of two tasks and their group."""
    return {
        "results": {
            name: {"acc,none": score, "acc_stderr,none": "N/A", "sample_len": 4, "alias": name}
            for name, score in scores.items()
        },
        "higher_is_better": {name: {"acc": True} for name in scores},
        "group_subtasks": {"both": ["a", "b"]},
        "samples": {
            name: [{"doc_id": number, "filter": "none", "acc": value} for number, value in enumerate(values)]
            for name, values in answers.items()
        },
    }


def test_the_error_of_a_difference_is_that_of_pairs_also_in_groups() -> None:
    mine = results({"a": 0.5, "b": 0.0, "both": 0.5 * 4 / 6}, a=(1, 0, 1, 0), b=(0, 0))
    theirs = results({"a": 0.75, "b": 0.5, "both": 4 / 6}, a=(1, 1, 1, 0), b=(1, 0))
    found = {name: tasks_module._scores(name, "runtime", mine, theirs)[0] for name in ("a", "b", "both")}
    assert found["a"].difference_stderr == pytest.approx(statistics.stdev([0, -1, 0, 0]) / 2)
    assert found["both"].difference_stderr == pytest.approx(statistics.stdev([0, -1, 0, 0, -1, 0]) / 6**0.5)
    assert [found[name].group for name in found] == ["both", "both", ""]
    assert [found[name].recovered for name in found] == [pytest.approx(2 / 3), None, pytest.approx(0.5)]
    assert found["a"].stderr is None
    mine["results"]["both"]["acc,none"] = 0.25  # the mean of the tasks, not of their questions
    assert tasks_module._scores("both", "runtime", mine, theirs)[0].difference_stderr is None


def test_the_verb_prints_both_measurements(gemma4: Case, files: dict[str, Path], text: Path) -> None:
    command = ["eval", gemma4.hf, f"--original={gemma4.checkpoint}", f"--tasks={files['choices']},{files['writing']}"]
    command += ["--context=64", "--limit=2"]
    found = json.loads(intaglio(*command, f"--text={text}", "--eval-tokens=256", "--json").out)
    assert found["kl_mean_nats"] > 0
    assert {(row["task"], row["samples"]) for row in found["tasks"]} == {("choices", 2), ("writing", 2)}
    outcome = intaglio(*command)
    assert outcome.code == 0 and "choices (2), acc" in " ".join(outcome.out.replace("│", " ").split())
    assert intaglio("eval", gemma4.hf, f"--original={gemma4.checkpoint}").code == 2


# Bad input


class Manager:
    """A stand-in for lm_eval's, which reads 14,000 files."""

    def __init__(self, include_defaults: bool) -> None:
        assert include_defaults
        self.all_tasks = ["arc_easy"]


def test_wrong_tasks_say_what_is_wrong(
    gemma4: Case, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*names: str, **settings: Any) -> list[TaskScore]:
        return evaluate_tasks(gemma4.hf, gemma4.checkpoint, names, Asking(**settings), device="cpu")

    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        ask("none.yaml")
    with pytest.raises(InputError, match="without a name"):
        ask()
    odd = tmp_path / "odd.yaml"
    odd.write_text(files["choices"].read_text().replace("data.jsonl", "nothing.jsonl"))
    with pytest.raises(InputError, match=r"lm_eval cannot ask them: .*nothing.jsonl"):
        ask(str(odd))
    with pytest.raises(InputError, match="expected at most 4: choose a larger --context"):
        ask(str(files["choices"]), context_tokens=4)
    with monkeypatch.context() as patched:
        patched.setattr("lm_eval.tasks.TaskManager", Manager)
        with pytest.raises(InputError, match="--tasks arc_hard: no such task: `lm_eval ls tasks`"):
            ask("arc_easy", "arc_hard")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'intaglio\[tasks\]'"):
        ask(str(files["choices"]))
