"""The report: its arithmetic, its escaping, and how a real browser lays it out."""

import base64
import dataclasses
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from intaglio.errors import OutputError
from intaglio.measure.metrics import Comparison
from intaglio.measure.render import count, duration, percent, size, snippet, with_ci
from intaglio.measure.report import (
    Artifact,
    ComparisonRow,
    CurvePoint,
    Kind,
    LayerRow,
    PlanRow,
    Provenance,
    Report,
    Sample,
    plan_rows,
    write_report,
)
from intaglio.measure.tasks import TaskScore
from intaglio.plan.plan import make_plan
from tests.support.browser import run_browser

LLAMA, TRANSFORMERS = "llama.cpp (llama-cpp-python 0.3.36)", "transformers 5.23.0"
MINIMAL = Report(title="A model on Q4_0", model="a-model", format="Q4_0", recipe_name="q4_0")
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)> \" ' ` </style></title></pre> {{ 7 * 7 }} {% raw %}"
    "\x00\x07\x1b[31m\x85\ud800\u202e | a \\| b ||\r\n# heading\n- item\n\n```\n| x |\n|---|\n"
    "[link](javascript:alert(1)) **bold** __bold__ ~~gone~~ $math$ &amp; <!-- " + "w" * 300
)


def comparison(kl: float, runtime: str = LLAMA, simulated: bool = False) -> Comparison:
    return Comparison(
        runtime=runtime,
        simulated=simulated,
        tokens=261_632,
        windows=512,
        kl_mean_nats=kl,
        kl_mean_ci_nats=kl / 50,
        kl_median_nats=kl / 3,
        kl_99_nats=kl * 6,
        kl_999_nats=kl * 14,
        kl_max_nats=kl * 40,
        same_top_share=0.9,
        same_top_ci=0.002,
        rms_delta_p=0.03,
        perplexity_reference=13.8,
        perplexity_reference_ci=0.2,
        perplexity_candidate=14.1,
        perplexity_candidate_ci=0.2,
        perplexity_ratio=1.02,
        perplexity_ratio_ci=0.003,
    )


def row(kind: Kind, kl: float | None, runtime: str = LLAMA, simulated: bool = False) -> ComparisonRow:
    labels = {"original": "Original", "stock": "stock Q4_0", "fitted": "MSE-fitted", "start": "GPTQ start"}
    label = labels.get(kind, "QAT")
    measured = None if kl is None else comparison(kl, runtime, simulated)
    return ComparisonRow(label=label, kind=kind, comparison=measured, size_bytes=None if simulated else 5_450_000)


def score(task: str, value: float, difference_stderr: float | None) -> TaskScore:
    return TaskScore(
        task=task,
        metric="acc",
        runtime=LLAMA,
        samples=2376,
        higher_is_better=True,
        score=value,
        stderr=0.009,
        original_score=0.72,
        original_stderr=0.009,
        difference_stderr=difference_stderr,
        recovered=value / 0.72,
    )


def full_report() -> Report:
    modules = {"self_attn.q_proj": "attention", "mlp.down_proj": "mlp", "input_layernorm": "norm"}
    layers = [
        LayerRow(
            tensor=f"model.layers.{layer}.{module}.weight",
            role=role,
            relative_rms={"stock": 0.0, "QAT": 0.0} if role == "norm" else {"stock": 0.08 + layer / 999, "QAT": 0.09},
        )
        for layer in range(8)
        for module, role in modules.items()
    ]
    return dataclasses.replace(
        MINIMAL,
        recipe_toml='name = "q4_0"\n\n[weights.linear]\nroles = ["attention", "mlp"]\ngrid = "q4_0"\n',
        plan=[
            PlanRow(role="token_embedding", grid="q6_k", tensors=1, parameters=1_048_576, size_bytes=860_160),
            PlanRow(role="attention", grid="q4_0", tensors=24, parameters=1_900_544, size_bytes=1_069_056),
        ],
        comparisons=[
            row("original", None),
            row("stock", 0.0652),
            row("fitted", 0.0572),
            row("trained", 0.0238),
            row("trained", 0.0237, TRANSFORMERS, simulated=True),
        ],
        tasks=[score("arc_easy", 0.71, 0.004), score("mmlu", 0.4, None)],
        loss_curve=[CurvePoint(step=i, tokens=i * 8192, value=0.02 + 0.04 / (1 + i)) for i in range(1000)],
        held_out_curve=[CurvePoint(step=i, tokens=i * 81920, value=0.02 + 0.04 / (1 + i)) for i in range(10)],
        codes_curve=[CurvePoint(step=i, tokens=i * 8192, value=0.03 * i / 100) for i in range(1, 101)],
        layers=layers,
        artifacts=[Artifact(name="a.gguf", size_bytes=5_450_000, sha256="9f86" * 16, verification="0 codes differ")],
        samples=[Sample(prompt="The river", continuations={"Original": " runs.", "QAT": "\n\n    runs on."})],
        provenance=Provenance(
            versions={"torch": "2.13.0"}, command="intaglio train", seconds=15123.0, tokens=9_830_400
        ),
        notes=["The row marked simulated is no exported file.", "One seed."],
    )


def map_strings(value: Any, change: Callable[[str], str], field_name: str = "") -> Any:
    """The same dataclasses with every string changed, but for the two that are not text."""
    if isinstance(value, str):
        return value if field_name == "kind" else change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (f.name for f in dataclasses.fields(value))
        return dataclasses.replace(value, **{n: map_strings(getattr(value, n), change, n) for n in names})
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    return value


def hostile_report() -> Report:
    """Hostile text in front of every string; at its end, names that make the same charts."""
    return map_strings(full_report(), lambda text: f"{HOSTILE} {text}")


def harmless_report() -> Report:
    """The same with harmless text: what the structure of the hostile one has to equal."""
    return map_strings(full_report(), lambda text: f"harmless {text}")


def written(report: Report, folder: Path) -> dict[str, str]:
    return {suffix: path.read_text("utf-8") for suffix, path in write_report(report, folder).items()}


# Headline and shares


def test_headline_takes_the_artifact_before_the_simulation():
    report = full_report()
    assert [round(pair.share, 3) for pair in report.recoveries()] == [0.635, 0.584]
    assert report.headline().startswith("QAT recovers 63% of what Q4_0 rounding loses; ")


def test_headline_of_a_simulation_when_nothing_else_was_measured():
    rows = [row("stock", 0.04, TRANSFORMERS, simulated=True), row("trained", 0.01, TRANSFORMERS, simulated=True)]
    report = dataclasses.replace(MINIMAL, comparisons=rows)
    assert report.headline() == "QAT recovers 75% of what Q4_0 rounding loses"


SIMULATED = {"runtime": TRANSFORMERS, "simulated": True}


@pytest.mark.parametrize(
    ("kls", "headline", "summary"),
    [
        (
            {"stock": 0.087, "fitted": 0.08, "start": 0.0529, "trained": 0.0516},
            "QAT recovers 41% of what Q4_0 rounding loses; its GPTQ start alone recovers 39%",
            "KL to the original: stock q4_0 0.0870, GPTQ start 0.0529, trained 0.0516. "
            "Training took off 2.5% of the start's KL.",
        ),
        (
            {"stock": 0.08, "fitted": 0.06, "trained": 0.02},
            "QAT recovers 75% of what Q4_0 rounding loses; its MSE-fitted start alone recovers 25%",
            "KL to the original: stock q4_0 0.0800, MSE-fitted 0.0600, trained 0.0200. "
            "Training took off 66.7% of the start's KL.",
        ),
        (
            {"stock": 0.08, "start": 0.05, "trained": 0.06},
            "QAT recovers 25% of what Q4_0 rounding loses; its GPTQ start alone recovers 38%",
            "KL to the original: stock q4_0 0.0800, GPTQ start 0.0500, trained 0.0600. "
            "Training added 20.0% of the start's KL.",
        ),
        (
            {"stock": 0.08, "start": 0.1, "trained": 0.06},
            "QAT recovers 25% of what Q4_0 rounding loses; its GPTQ start alone is 25% further",
            "KL to the original: stock q4_0 0.0800, GPTQ start 0.1000, trained 0.0600. "
            "Training took off 40.0% of the start's KL.",
        ),
    ],
    ids=["GPTQ", "fit", "worse", "bad start"],
)
def test_start_and_training_are_told_apart(kls: dict[Kind, float], headline: str, summary: str, tmp_path: Path) -> None:
    rows = [row(kind, kl, **SIMULATED) for kind, kl in kls.items()]
    report = dataclasses.replace(
        MINIMAL, comparisons=[row("trained", 0.9), *rows]
    )  # the artifact has no start to compare
    assert report.headline() == headline
    texts = written(report, tmp_path)
    path = report.path()
    assert path is not None and path.summary == summary
    curved = dataclasses.replace(report, codes_curve=[CurvePoint(step=1, tokens=8, value=0.041)])
    page = " ".join(html.unescape(written(curved, tmp_path / "curve")["html"]).split())
    assert f". {summary} Training changed 4.1% of the codes." in page
    assert summary in texts["md"] and html.escape(summary, quote=False).replace("'", "&#39;") in texts["html"]


def test_a_row_that_failed_says_why(tmp_path: Path) -> None:
    reason = "it ended with signal 11"
    failed = ComparisonRow(label="QAT, in llama.cpp", kind="trained", comparison=None, failure=reason)
    rows = [row("original", None), row("stock", 0.04), failed]
    texts = written(dataclasses.replace(MINIMAL, comparisons=rows), tmp_path)
    assert f"| QAT, in llama.cpp | not measured: {reason} | " in texts["md"]
    assert f"not measured: {reason}" in texts["html"]
    assert json.loads(texts["json"])["comparisons"][2]["failure"] == reason


def test_headline_says_when_training_made_it_worse():
    report = dataclasses.replace(MINIMAL, comparisons=[row("stock", 0.04), row("trained", 0.05)])
    assert report.headline() == "QAT is 25% further from the original than Q4_0 rounding"


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("stock", 0.04)],
        [row("stock", 0.04), row("trained", 0.01, TRANSFORMERS, simulated=True)],
        [row("stock", 0.0), row("trained", 0.0)],
    ],
    ids=["nothing", "no training", "another runtime", "no loss"],
)
def test_no_share_without_a_comparable_baseline(rows: list[ComparisonRow]):
    report = dataclasses.replace(MINIMAL, comparisons=rows)
    assert report.recoveries() == []
    assert report.headline() == "A model on Q4_0"


def test_plan_rows_add_up_to_the_plan():
    config = {"model_type": "gemma3_text", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 512}
    plan = make_plan(config, "q4_0")
    rows = plan_rows(plan)
    assert sum(r.size_bytes for r in rows) == plan.size_bytes
    assert sum(r.tensors for r in rows) == len(plan.tensors)
    assert {("attention", "q4_0"), ("token_embedding", "q6_k")} <= {(r.role, r.grid) for r in rows}


# Files


def test_json_holds_the_numbers_and_what_follows_from_them(tmp_path: Path):
    data = json.loads(written(full_report(), tmp_path)["json"])
    assert data["headline"] == "QAT recovers 63% of what Q4_0 rounding loses; its MSE-fitted start alone recovers 12%"
    assert data["comparisons"][3]["comparison"]["kl_mean_nats"] == 0.0238
    assert data["layers"][0]["snr_db"]["stock"] == pytest.approx(21.938, abs=1e-3)
    assert data["layers"][2]["snr_db"]["stock"] is None  # an exact tensor: infinite, which JSON cannot say


def test_markdown_has_the_table(tmp_path: Path):
    text = written(full_report(), tmp_path)["md"]
    assert "| QAT | llama.cpp (llama-cpp-python 0.3.36) | 0.0238 ± 0.0005 | 0.0079 | 0.1428 | 90.0% | 14.10 |" in text
    assert "| QAT | transformers 5.23.0, simulated |" in text


def test_parts_without_data_are_left_out(tmp_path: Path):
    texts = written(MINIMAL, tmp_path)
    assert "<section" not in texts["html"]
    assert "\n##" not in texts["md"]
    assert "A model on Q4_0" in texts["html"] and "A model on Q4_0" in texts["md"]


@pytest.mark.parametrize(
    "field", ["plan", "comparisons", "loss_curve", "held_out_curve", "codes_curve", "layers", "artifacts", "samples"]
)
def test_every_part_stands_alone(field: str, tmp_path: Path):
    report = dataclasses.replace(MINIMAL, **{field: getattr(full_report(), field)})
    for name, only in (
        ("part", report),
        ("first", dataclasses.replace(MINIMAL, **{field: getattr(report, field)[:2]})),
    ):
        assert written(only, tmp_path / name)["html"].count("<section") == 1


def test_existing_files_are_kept_unless_replaced(tmp_path: Path):
    paths = write_report(MINIMAL, tmp_path)
    before = paths["html"].read_bytes()
    with pytest.raises(OutputError, match="already exists"):
        write_report(full_report(), tmp_path)
    assert paths["html"].read_bytes() == before
    write_report(full_report(), tmp_path, replace=True)
    assert paths["html"].read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_page_asks_nobody_for_anything(tmp_path: Path):
    page = written(full_report(), tmp_path)["html"]
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(|src=", page)


def test_equal_artifacts_have_equal_rosettes(tmp_path: Path):
    pages = [
        written(dataclasses.replace(full_report(), artifacts=[artifact]), tmp_path / str(i))["html"]
        for i, artifact in enumerate(Artifact(name=n, size_bytes=1, sha256=s) for n, s in ("aa", "ba", "ab"))
    ]
    first, same, other = (re.search(r'id="ring1" d="([^"]+)"', page).group(1) for page in pages)  # type: ignore[union-attr]
    assert first == same != other


# Escaping


class Structure(HTMLParser):
    """Tags with the names of their attributes, and the text between them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # class and width depend on numbers and kinds only, which are the same in both reports
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_changes_no_tag_of_the_page(tmp_path: Path):
    harmless = Structure(written(harmless_report(), tmp_path / "harmless")["html"])
    page = written(hostile_report(), tmp_path / "hostile")["html"]
    hostile = Structure(page)
    assert hostile.tags == harmless.tags
    assert hostile.text.count("<script>alert(1)</script>") > 40
    assert "{{ 7 * 7 }}" in hostile.text
    assert "␀␇␛[31m\ufffd\ufffd\ufffd" in hostile.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", page)


def test_hostile_text_changes_no_element_of_the_markdown(tmp_path: Path):
    def elements(text: str) -> list[str]:
        tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(text)
        return [t.type for token in tokens for t in [token, *(token.children or [])] if t.type != "text"]

    harmless = written(harmless_report(), tmp_path / "harmless")["md"]
    hostile = written(hostile_report(), tmp_path / "hostile")["md"]
    assert elements(hostile) == elements(harmless)


@pytest.mark.parametrize("start", ["# a", "- a", "+ a", "1. a", "1) a", "---", "===", "> a", "* a", "```", "| a |"])
def test_a_note_stays_one_item_of_a_list(start: str, tmp_path: Path):
    text = written(dataclasses.replace(MINIMAL, notes=[start]), tmp_path)["md"]
    types = [token.type for token in MarkdownIt("commonmark").parse(text.partition("## Notes")[2])]
    assert types == [
        "bullet_list_open",
        "list_item_open",
        "paragraph_open",
        "inline",
        "paragraph_close",
        "list_item_close",
        "bullet_list_close",
    ]


def test_hostile_text_is_whole_in_the_json(tmp_path: Path):
    data = json.loads(written(hostile_report(), tmp_path)["json"])
    assert data["model"] == f"{HOSTILE} a-model"


# Number formats


def test_number_formats():
    assert [with_ci(0.02384, 0.00041), with_ci(0.02384, None), with_ci(0, 0)] == ["0.0238 ± 0.0004", "0.0238", "0"]
    assert with_ci(1.52e-5, 2.4e-6) == "(1.5 ± 0.2) × 10⁻⁵"
    assert [percent(0.634), percent(0.9962), percent(1), percent(0.9996)] == ["63%", "99.6%", "100%", "99.9%"]
    assert [size(999), size(1000), size(999_600), size(2_634_000_000)] == ["999 B", "1 kB", "1 MB", "2.63 GB"]
    assert [count(950), count(12_345), count(1_881_000_000)] == ["950", "12.3 k", "1.88 B"]
    assert [duration(9), duration(61), duration(15123)] == ["9 s", "1 min 1 s", "4 h 12 min"]
    assert [snippet(" runs"), snippet("\n\n    runs\n"), snippet("")] == ["runs", "    runs", ""]


# Browser


@pytest.mark.browser
@pytest.mark.parametrize("make", [full_report, hostile_report], ids=["full", "hostile"])
def test_page_fits_every_width(make: Callable[[], Report], tmp_path: Path):
    page = written(make(), tmp_path)["html"]
    widths = (320, 380, 600, 761, 900, 981, 1280)
    frames = "".join(f'<iframe width="{w}" height="800" srcdoc="{html.escape(page)}"></iframe>' for w in widths)
    measure = (
        "onload = () => document.title = [...document.querySelectorAll('iframe')].map(f => {"
        "const page = f.contentDocument.documentElement;"
        "const plate = f.contentDocument.querySelector('h1').getBoundingClientRect();"
        "return Math.max(page.scrollWidth, Math.ceil(plate.right)) }).join(' ')"
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html>{frames}<script>{measure}</script>", "utf-8")
    dom = run_browser(wrapper.as_uri(), tmp_path, "--dump-dom")
    found = re.search(r"<title>([\d ]+)</title>", dom)
    assert found, "the wrapper page did not measure its frames"
    assert [int(width) for width in found[1].split()] == list(widths)


def pixels(picture: Path) -> tuple[int, int, list[tuple[float, float]]]:
    """Width, height, and for each third of the picture the mean and deviation of its brightness in
    0..255, as the browser itself decodes the PNG."""
    measure = (
        "onload = () => { const image = document.querySelector('img'), canvas = document.createElement('canvas');"
        "const [w, h] = [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];"
        "const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);"
        "const third = Math.floor(h / 3), numbers = [w, h];"
        "for (const top of [0, third, 2 * third]) {"
        "const data = context.getImageData(0, top, w, third).data; let sum = 0, squares = 0;"
        "for (let i = 0; i < data.length; i += 4) { sum += data[i]; squares += data[i] * data[i] }"
        "const mean = sum / (w * third); numbers.push(mean, Math.sqrt(squares / (w * third) - mean * mean)) }"
        "document.title = numbers.join(' ') }"
    )
    data = base64.b64encode(picture.read_bytes()).decode()
    page = picture.with_suffix(".html")
    page.write_text(f'<!doctype html><img src="data:image/png;base64,{data}"><script>{measure}</script>', "utf-8")
    found = re.search(r"<title>([\d. ]+)</title>", run_browser(page.as_uri(), picture.parent, "--dump-dom"))
    assert found, "the browser did not decode its own picture"
    width, height, *thirds = (float(number) for number in found[1].split())
    return int(width), int(height), list(zip(thirds[::2], thirds[1::2], strict=True))


@pytest.mark.browser
def test_page_renders_in_light_and_dark(tmp_path: Path):
    page = write_report(full_report(), tmp_path)["html"]
    for scheme, flags in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        picture = tmp_path / f"{scheme}.png"
        run_browser(page.as_uri(), tmp_path, "--window-size=1100,1600", f"--screenshot={picture}", *flags)
        width, height, thirds = pixels(picture)
        assert (width, height) == (1100, 1600)
        for mean, deviation in thirds:
            assert deviation > 5, f"a third of the {scheme} page is blank"
            assert mean > 200 if scheme == "light" else mean < 60


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(scheme: int):
    css = (resources.files("intaglio.measure") / "templates" / "report.css").read_text("utf-8")
    root = re.findall(r":root \{(.*?)\}", css, re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", root))

    def luminance(colour: str) -> float:  # WCAG 2.2, relative luminance
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name, least in (("ink", 12), ("soft", 4.5), ("accent", 4.5)):
        bright, dark = sorted((luminance(colours[name]), luminance(colours["paper"])), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= least, name
