"""Recipes: TOML in, TOML out, and each mistake named by its key and what was expected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from intaglio.errors import RecipeError
from intaglio.formats.table import MOBILE
from intaglio.numerics.grid import F16, Q4_0, Q4_0_FREE, Q8_0
from intaglio.plan.drafting import Drafting
from intaglio.plan.families import ROLES
from intaglio.plan.recipe import Recipe, WeightRule, preset_names
from intaglio.plan.schedule import Schedule
from intaglio.plan.static import Activations, KvCache

PRESETS = ["drafter", "drafter-mobile", "drafter-q4_0", "mobile", "mobile-e2b", "mobile-e4b"]
PRESETS += ["q2_0", "q4_0", "q4_0-free", "q4_0-litert", "q4_0-stock"]
RULE = '[weights.linear]\nroles = ["mlp"]\ngrid = "q4_0"\n'
MINIMAL = f'name = "x"\n{RULE}'


def test_the_presets_are_these() -> None:
    assert preset_names() == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_from_toml(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.summary
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_what_differs_from_every_default_comes_back() -> None:
    rules = (
        WeightRule(name="b", grid=Q8_0, roles=("mlp", "attention"), match=r"layers\.\d+", trainable=False),
        WeightRule(name="a", grid=F16, match='quoted "name"', layers="3-17", optional=True),
    )
    schedule = Schedule(
        tokens=1, batch_size=2, micro_batch=3, sequence_length=4, lr=5e-5, scale_lr=6e-6, embedding_lr=0.7,
        float_lr=8.0, warmup=0.8, betas=(0.1, 0.2), weight_decay=0.3, clip=0.4, frozen_tail=0.5, tail_lr=0.6, seed=7,
    )  # fmt: skip
    recipe = Recipe(name="ünï", summary='a "b"\nc', fit="stock", rules=rules[1:], schedule=schedule)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    recipe = Recipe(
        name="x", rules=rules, schedule=schedule, families=("gemma4_text",), kv_cache=KvCache(),
        activations=Activations(roles=("mlp",), dropout=0.25),
        drafter=Drafting(step_weights=(2.0, 0.5), clusters="keep"),
    )  # fmt: skip
    assert [rule.name for rule in Recipe.from_toml(recipe.to_toml()).rules] == ["b", "a"]
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_a_recipe_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL, "utf-8")
    assert Recipe.load(path) == Recipe.load(str(path)) == Recipe.from_toml(MINIMAL)


def test_the_free_preset_differs_in_the_grid_of_linears_only() -> None:
    portable, free = Recipe.load("q4_0"), Recipe.load("q4_0-free")
    assert {rule.name for a, b in zip(portable.rules, free.rules, strict=True) for rule in [a] if a != b} >= {"linear"}
    assert portable.rule_for("x", "mlp").grid == Q4_0
    assert free.rule_for("x", "mlp").grid == Q4_0_FREE
    assert portable.schedule == free.schedule


def test_the_first_rule_that_fits_wins() -> None:
    first = '[weights.first]\nmatch = "layers.0"\nroles = ["mlp"]\ngrid = "f16"\n'
    recipe = Recipe.from_toml(f'name = "x"\n{first}{RULE}')
    chosen = [recipe.rule_for(f"model.layers.{i}.mlp.up_proj.weight", "mlp").name for i in (0, 1)]
    assert chosen == ["first", "linear"]
    assert recipe.rule_for("model.layers.0.self_attn.q_proj.weight", "attention") is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("schedule.lr=2e-4", lambda r: r.schedule.lr == 2e-4),
        ("schedule.lr = 2", lambda r: r.schedule.lr == 2.0 and isinstance(r.schedule.lr, float)),
        ("schedule.tokens=1e6", lambda r: r.schedule.tokens == 1_000_000 and isinstance(r.schedule.tokens, int)),
        ("schedule.betas=[0.8, 0.99]", lambda r: r.schedule.betas == (0.8, 0.99)),
        ("weights.token_embedding.grid=q8_0", lambda r: r.rule_for("x", "token_embedding").grid == Q8_0),
        ("weights.ple_embedding.trainable=true", lambda r: r.rule_for("x", "ple_embedding").trainable),
        ("name=mine", lambda r: r.name == "mine"),
        ("summary='a = b'", lambda r: r.summary == "a = b"),
    ],
)
def test_overrides(override: str, expected) -> None:
    assert not expected(Recipe.load("q4_0"))
    changed = Recipe.load("q4_0", [override])
    assert expected(changed)
    assert Recipe.from_toml(changed.to_toml()) == changed


def test_the_last_override_wins() -> None:
    assert Recipe.load("q4_0", ["schedule.lr=1", "schedule.lr=2"]).schedule.lr == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.lr", r"--set 'schedule\.lr': expected key=value"),
        ("name.first=x", r"--set 'name\.first=x': 'name' of q4_0 is a value"),
        ("schedule.speed=3", "unknown key 'speed': expected one of assistant_only"),
        ("scedule.lr=3", "unknown key 'scedule': expected one of activations, channel_scales, drafter, families, fit"),
        ("weights.linear.grid=q5_0", r"\[weights\.linear\].*'q5_0': expected one of bf16, f16, f32, i64, int2"),
        ("=3", "unknown key ''"),
    ],
)
def test_overrides_that_make_no_sense_are_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load("q4_0", [override])


def rule(**keys: str) -> str:
    body = {"roles": '["mlp"]', "grid": '"q4_0"'} | keys
    return 'name = "x"\n[weights.linear]\n' + "".join(f"{key} = {value}\n" for key, value in body.items() if value)


MALFORMED = {
    "no TOML": ("name = ", "not valid TOML"),
    "a key twice": ('name = "x"\nname = "y"', "not valid TOML"),
    "nested too deep": ("name = " + "[" * 100_000, "not valid TOML"),
    "a NUL byte": ('name = "\0"', "not valid TOML"),
    "no name": (RULE, "name = None: expected str"),
    "a name that is a number": (f"name = 3\n{RULE}", "name = 3: expected str"),
    "a summary that is a number": (f'name = "x"\nsummary = 3\n{RULE}', "summary = 3: expected str"),
    "unknown key": (
        f'name = "x"\nversion = 3\n{RULE}',
        "unknown key 'version': expected one of activations, channel_scales, drafter, families",
    ),
    "unknown fit": (f'name = "x"\nfit = "best"\n{RULE}', "fit = 'best': expected one of mse, absmax, stock"),
    "a fit that is a list": (f'name = "x"\nfit = ["mse"]\n{RULE}', r"fit = \['mse'\]: expected one of mse, absmax"),
    "no rules": ('name = "x"', r"no \[weights\.NAME\] rules"),
    "rules that are no table": ('name = "x"\nweights = 3', r"no \[weights\.NAME\] rules"),
    "a rule that is no table": ('name = "x"\n[weights]\nlinear = 3', r"\[weights\.linear\]: expected a table, got 3"),
    "unknown key in a rule": (rule(bits="4"), r"\[weights\.linear\]: unknown key 'bits': expected one of grid, layers"),
    "no grid": (rule(grid=""), r"\[weights\.linear\]: grid = None: expected str"),
    "unknown grid": (rule(grid='"q5"'), r"\[weights\.linear\].*'q5': expected one of bf16"),
    "neither roles nor match": (rule(roles=""), r"\[weights\.linear\]: neither roles nor match"),
    "roles that are a string": (rule(roles='"mlp"'), r"\[weights\.linear\]: roles = 'mlp': expected a list of"),
    "roles that are a number": (rule(roles="3"), r"\[weights\.linear\]: roles = 3: expected a list of"),
    "an unknown role": (rule(roles='["mlp", "mpl"]'), r"\[weights\.linear\]: roles = .*'mpl'.*: expected a list of"),
    "a role that is a number": (rule(roles="[3]"), r"\[weights\.linear\]: roles = \[3\]: expected a list of"),
    "a match that is no expression": (rule(match='"("'), r"\[weights\.linear\]: match '\(' is not a regular"),
    "a match that is a number": (rule(match="3"), r"\[weights\.linear\]: match 3 is not a regular"),
    "trainable that is a string": (rule(trainable='"no"'), r"\[weights\.linear\]: trainable = 'no': expected bool"),
    "optional that is a number": (rule(optional="1"), r"\[weights\.linear\]: optional = 1: expected bool"),
    "stock scales on a portable grid": (f'name = "x"\nfit = "stock"\n{RULE}', "grid q4_0 of .*use the -free grids"),
    "stock scales on a channel grid": (
        'name = "x"\nfit = "stock"\n' + RULE.replace("q4_0", "int4"), "grid int4 of .*use the -free grids"
    ),
    "scales by absmax of a GGUF grid": (
        f'name = "x"\nfit = "absmax"\n{RULE}', "grid q4_0 of .*does not hold: use int2, int4 and int8"
    ),
    "families that are a string": (f'name = "x"\nfamilies = "gemma4"\n{RULE}', "families = 'gemma4': expected a list"),
    "an unknown family": (f'name = "x"\nfamilies = ["gemma4"]\n{RULE}', "families = .*: expected a list of gemma2"),
    "layers that are a number": (rule(layers="3"), r"\[weights\.linear\]: layers = 3: expected 'early' or 'late'"),
    "layers that are unknown": (rule(layers='"first"'), "layers = 'first': expected 'early' or 'late'.* '0-14'"),
    "layers in the wrong order": (rule(layers='"9-3"'), "layers = '9-3': expected"),
    "activations that are no table": (f"activations = 8\n{MINIMAL}", r"\[activations\]: expected a table, got 8"),
    "unknown key of activations": (f"{MINIMAL}[activations]\nbit = 8\n", "unknown key 'bit': expected one of bits"),
    "activations of four bits": (f"{MINIMAL}[activations]\nbits = 4\n", "bits = 4: expected 8"),
    "bits that are a float": (f"{MINIMAL}[activations]\nbits = 8.0\n", "bits = 8.0: expected 8"),
    "bits that are true": (f"{MINIMAL}[kv_cache]\nbits = true\n", "bits = True: expected 8"),
    "activations of norms": (f'{MINIMAL}[activations]\nroles = ["norm"]\n', r"roles = \['norm'\]: expected a list"),
    "activations of nothing": (f"{MINIMAL}[activations]\nroles = []\n", r"roles = \[\]: expected a list of attention"),
    "more dropout than steps": (f"{MINIMAL}[activations]\ndropout = 1.5\n", r"dropout = 1.5: expected a share"),
    "dropout that is no number": (f"{MINIMAL}[activations]\ndropout = nan\n", r"dropout = nan: expected a share"),
    "a cache that is no table": (f"kv_cache = 8\n{MINIMAL}", r"\[kv_cache\]: expected a table, got 8"),
    "unknown key of the cache": (f"{MINIMAL}[kv_cache]\nroles = []\n", "unknown key 'roles': expected one of bits"),
    "a schedule that is no table": (f'name = "x"\nschedule = 3\n{RULE}', r"\[schedule\]: expected a table, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_recipes_are_named(kind: str) -> None:
    text, message = MALFORMED[kind]
    with pytest.raises(RecipeError, match=f"mine.toml.*{message}"):
        Recipe.from_toml(text, source="mine.toml")


SCHEDULES = {
    "speed = 3": "unknown key 'speed': expected one of assistant_only",
    'lr = "fast"': "lr = 'fast': expected float",
    "lr = true": "lr = True: expected float",
    "lr = nan": "lr = nan: expected",
    "lr = inf": "lr = inf: expected",
    "lr = -1e-5": "lr = -1e-05: expected 0 or more",
    "tokens = 1.5": "tokens = 1.5: expected int",
    "tokens = inf": "tokens = inf: expected int",
    "tokens = 0": "tokens = 0: expected 1 or more",
    "batch_size = 0": "batch_size = 0: expected 1 or more",
    "micro_batch = -1": "micro_batch = -1: expected 0 or more",
    "sequence_length = 1": "sequence_length = 1: expected 2 or more",
    "seed = -1": "seed = -1: expected 0 or more",
    "warmup = 1": r"warmup = 1.0: expected a share in \[0, 1\)",
    "warmup = nan": r"warmup = nan: expected",
    "frozen_tail = 1.5": r"frozen_tail = 1.5: expected a share",
    "betas = 0.9": "betas = 0.9: expected two numbers",
    "betas = [0.9]": r"betas = \[0.9\]: expected two numbers",
    'betas = [0.9, "x"]': "betas = .*: expected two numbers",
    "betas = [0.9, 1.0]": "betas = .*: expected two numbers",
}


@pytest.mark.parametrize("line", SCHEDULES)
def test_malformed_schedules_are_named(line: str) -> None:
    with pytest.raises(RecipeError, match=rf"mine\.toml: \[schedule\]: {SCHEDULES[line]}"):
        Recipe.from_toml(f"{MINIMAL}[schedule]\n{line}\n", source="mine.toml")


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match="no recipe 'q4': expected a TOML file or one of drafter, drafter-mobile, drafter-q4_0, mobile",
    ):
        Recipe.load("q4")
    with pytest.raises(RecipeError, match="no recipe"):
        Recipe.load(tmp_path)


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(RecipeError, match=r"mine\.toml: cannot be read as UTF-8"):
        Recipe.load(path)


def test_every_message_of_this_file_says_what_is_expected() -> None:
    for text, _ in MALFORMED.values():
        with pytest.raises(RecipeError) as caught:
            Recipe.from_toml(text, source="mine.toml")
        assert re.search(r"expected|does not hold: use|not valid TOML|not a regular expression", str(caught.value))


def test_presets_name_every_role_but_the_head() -> None:
    for name in PRESETS:
        recipe = Recipe.load(name)
        named = {role for rule in recipe.rules for role in rule.roles}
        of_drafters = {"drafter_projection", "centroids", "token_ordering"}
        others = (
            of_drafters | {"expert", "router"} if recipe.families else set()
        )  # the mobile format knows none of these
        if recipe.drafter is not None:
            others = {"expert", "router", "ple_linear", "ple_embedding", "ple_model_projection"}
        assert {role for _, role in ROLES} - named <= {"head"} | others


def test_layers_tell_rules_apart() -> None:
    recipe = Recipe.load("mobile")
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 14, 15, 34)]
    assert [recipe.rule_for(name, "mlp", 15).name for name in names] == ["mlp_early"] * 2 + ["mlp_late"] * 2
    span = Recipe.from_toml(MINIMAL + 'layers = "3-4"\n')
    assert [bool(span.rule_for(f"model.layers.{i}.mlp.up_proj.weight", "mlp")) for i in range(1, 7)] == [
        False, False, True, True, False, False,
    ]  # fmt: skip
    assert span.rule_for("model.norm.weight", "mlp") is None


@pytest.mark.parametrize("name", ["mobile", "mobile-e2b", "mobile-e4b"])
def test_the_reference_of_a_mobile_recipe_differs_in_its_fit_only(name: str) -> None:
    recipe = Recipe.load(name)
    mobile, reference = recipe.to_dict(), MOBILE.stock_recipe(recipe).to_dict()
    assert {key for key in mobile if mobile[key] != reference[key]} == {"name", "fit"}
    assert Recipe.load(name, ["fit=absmax"]).rules == MOBILE.stock_recipe(recipe).rules


def test_recipes_for_gguf_say_nothing_of_activations() -> None:
    """So that their plans keep the digests that they had before recipes could."""
    for name in ("q4_0", "q4_0-free", "q4_0-stock"):
        assert set(Recipe.load(name).to_dict()) == {"name", "summary", "fit", "weights", "schedule"}


def test_channel_scales_may_be_those_that_bfloat16_holds() -> None:
    plain, narrow = Recipe.load("mobile-e2b"), Recipe.load("mobile-e2b", ["channel_scales=bf16"])
    for before, after in zip(plain.rules, narrow.rules, strict=True):
        channel = before.grid.name.startswith("int")
        assert after.grid.name == before.grid.name + "-bf16" * channel
    assert Recipe.from_toml(narrow.to_toml()) == narrow
    assert Recipe.load("mobile-e2b", ["channel_scales=f32"]) == plain
    with pytest.raises(RecipeError, match="no rule has grid int2, int4 or int8"):
        Recipe.load("q4_0", ["channel_scales=bf16"])
    with pytest.raises(RecipeError, match="channel_scales = 'f16'"):
        Recipe.load("mobile", ["channel_scales=f16"])
