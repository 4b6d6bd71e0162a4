"""The quality table of benchmarks/quality: its rows can be made, and it says of each what was measured."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

QUALITY = Path(__file__).parents[2] / "benchmarks/quality"
DOMAIN = {"kl_mean_nats": 0.05, "kl_mean_ci_nats": 0.004, "kl_median_nats": 0.01, "kl_99_nats": 0.4, "tokens": 100}
DOMAIN |= {"same_top_share": 0.9, "perplexity_reference": 12.0, "perplexity_candidate": 12.5}
WHOLE = {"held-out": DOMAIN, "code": DOMAIN | {"kl_mean_nats": 0.07}, "greedy": {"median": 30.0, "same_share": 0.8}}
COST = {"embeddings": "float", "calibration_tokens": 131072, "training_tokens": 0, "bits_a_weight": 4.5}
COST |= {"cpu_seconds": 61.0, "peak_rss_bytes": 2e9}
TEXT = {"source": "somewhere", "bytes_a_token": 3.2}


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules that run in our own environment; they find each other beside themselves, as scripts do."""
    monkeypatch.syspath_prepend(str(QUALITY))
    names = ("methods", "table", "texts", "run")
    modules = {name: __import__(name) for name in names}
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return modules


def test_every_row_has_a_script_and_every_environment_its_versions(quality: dict[str, ModuleType]) -> None:
    methods = quality["methods"].METHODS
    scripts = {f"{method.script}.py" for method in methods.values()}
    assert not [name for name in scripts if not (QUALITY / name).is_file()]
    assert {path.name for path in QUALITY.glob("peer_*.py")} <= scripts
    environments = {method.environment for method in methods.values()} - {""}
    assert {path.stem for path in (QUALITY / "requirements").glob("*.txt")} == environments
    assert {method.latents_of for method in methods.values()} - {None} <= methods.keys()


def test_the_table_shows_the_form_nearest_to_a_user_and_names_what_failed(quality: dict[str, ModuleType]) -> None:
    short = {"held-out": DOMAIN | {"kl_mean_nats": 0.06}}
    made = {"label": "A", **COST, "gguf_bytes": 5_600_000, "forms": {"llama.cpp": WHOLE, "decoded": short}}
    only = {"label": "B", **COST, "forms": {"decoded": WHOLE, "as it came": short}}
    failed = {"label": "C", "failure": "KeyError: 'x'"}
    result = {"texts": {"held-out": TEXT, "code": TEXT}, "methods": {"a": made, "b": only, "c": failed}}
    lines = quality["table"].tables(result)
    assert "| A | 0.0500 ± 0.0040 | 0.0600 |  | 0.400 | 90.0% | 12.500 | 30, 80.0% |" in lines
    assert "| B |  | 0.0500 ± 0.0040 | 0.0600 | 0.400 | 90.0% | 12.500 | 30, 80.0% |" in lines
    assert "| A | 5.60 MB | float | 131,072 | 61 | 2.00 GB |" in lines
    assert "| B | decoded | 0.0500 ± 0.0040 | 0.0700 ± 0.0040 |" in lines
    assert "- C did not run: `KeyError: 'x'`" in lines


def test_a_page_keeps_what_stands_around_its_tables(quality: dict[str, ModuleType], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    table = quality["table"]
    page.write_text(f"before\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n", "utf-8")
    row = {"label": "A", **COST, "forms": {"decoded": WHOLE}}
    table.write_table({"texts": {"held-out": TEXT, "code": TEXT}, "methods": {"a": row}}, page)
    text = page.read_text("utf-8")
    assert text.startswith(f"before\n\n{table.BEGIN}\n\n| method") and text.endswith(f"{table.END}\n\nafter\n")
    assert "old" not in text


def test_translations_are_read_without_a_catalogues_head(quality: dict[str, ModuleType]) -> None:
    catalogue = (
        'msgid ""\nmsgstr ""\n"Language: fr\\n"\n\nmsgid "day"\nmsgid_plural "days"\nmsgstr[0] "jour"\n'
        'msgstr[1] "jours"\n\nmsgid "a"\nmsgstr ""\n"un "\n"deux"\n\nmsgid "none"\nmsgstr ""\n'
    )
    assert list(quality["texts"].messages(catalogue)) == ["jour", "jours", "un deux"]


def test_a_method_that_fails_leaves_its_error_and_not_a_progress_bar(
    quality: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = quality["run"]
    monkeypatch.setattr(run, "HERE", tmp_path)
    program = "import sys\nsys.exit('Traceback:\\nmodule.KeyError: 7\\nlayer 2 of 8')\n"
    (tmp_path / "broken.py").write_text(program, "utf-8")
    assert not run.make("row", quality["methods"].Method("Row", "broken"), tmp_path, tmp_path / "work")
    assert (tmp_path / "work/methods/row/failure.txt").read_text("utf-8") == "module.KeyError: 7\n"
