"""The import law of the design, and what no source file may do."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

import intaglio
from intaglio import errors

SOURCE = Path(intaglio.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {".".join(("intaglio", *path.relative_to(SOURCE).with_suffix("").parts)): path for path in FILES}

# A part may import itself and the parts of the levels before its own. Imports inside functions count like any other.
LEVELS = (
    ("errors", "progress", "tiny"),
    ("numerics",),
    ("plan",),
    ("packed",),
    ("train", "formats"),
    ("drafter", "sizing", "sources"),
    ("measure",),
    ("runs",),
    ("__init__", "cli"),  # __init__ names all that is public, and loads it when it is used
    ("__main__",),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
BARRED = {"sizing": {"train"}}  # sizes come from the plan alone
# Only what learns or quantizes may fit a scale; anything else that could would be able to re-quantize.
MAY_FIT = {f"intaglio.train.{name}" for name in ("calibrate", "gptq", "latents", "quantize", "towers")}
NUMERICS_NEEDS = {"torch", "numpy"}


def part(module: str) -> str:
    """`intaglio.train.loop` belongs to `train`."""
    return module.split(".")[1] if "." in module else "__init__"


@functools.cache
def imports(module: str) -> list[tuple[str, ast.AST]]:
    """Every module that a module imports, anywhere in it, with the node."""
    return list(_imports(module))


def _imports(module: str) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            yield node.module or "", node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


each_module = pytest.mark.parametrize("module", MODULES)


def reached(module: str) -> set[str]:
    """Modules of ours that a module imports, and those that these import."""
    seen, ahead = set(), [module]
    while ahead:
        new = {name for name, _ in imports(ahead.pop()) if name in MODULES} - seen
        seen |= new
        ahead += new
    return seen


def test_every_part_is_in_the_law() -> None:
    assert {part(module) for module in MODULES} == set(LEVEL_OF)


@each_module
def test_imports_go_downhill(module: str) -> None:
    own = part(module)
    lower = {name for name, level in LEVEL_OF.items() if level < LEVEL_OF[own]} - BARRED.get(own, set())
    wrong = [
        f"{module}:{node.lineno} imports {name}"  # type: ignore[attr-defined]
        for name, node in imports(module)
        if name.startswith("intaglio.") and part(name) not in lower | {own}
    ]
    assert not wrong


@each_module
def test_imports_go_in_no_circle(module: str) -> None:
    assert module not in reached(module)


READERS = [name for name in MODULES if part(name) == "formats" and name.split(".")[-1].startswith(("read", "verify"))]
WRITING = re.compile(r"intaglio\.formats\.(table|write\w*|\w+\.write\w*|litert\.converter\..+)")


@pytest.mark.parametrize("module", READERS)
def test_readers_reach_no_writer(module: str) -> None:
    assert not [name for name in reached(module) if WRITING.fullmatch(name)]


@each_module
def test_only_training_and_quantizing_may_fit(module: str) -> None:
    fitting = [name for name, _ in imports(module) if name.startswith("intaglio.numerics.fit")]
    assert not fitting or module in MAY_FIT or module.startswith("intaglio.numerics.fit")


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) == "numerics"])
def test_numerics_know_no_model_and_no_file(module: str) -> None:
    roots = {name.split(".")[0] for name, _ in imports(module)}
    others = roots - NUMERICS_NEEDS - {"intaglio"} - set(sys.stdlib_module_names)
    assert not others
    assert not roots & {"pathlib", "os", "io", "json"}


# Everything else asks the family's row. The class is the one by which Transformers.js knows the graphs of a file.
NAMES_FAMILIES = {"intaglio.plan.families": None, "intaglio.formats.onnx.write": {"Gemma4ForConditionalGeneration"}}


@pytest.mark.parametrize("module", [name for name in MODULES if NAMES_FAMILIES.get(name, name) is not None])
def test_only_the_table_names_a_family(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {ast.get_docstring(node, clean=False) for node in documented}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    named = {text for text in texts - docstrings if re.search(r"gemma_?\d", text, re.IGNORECASE)}
    assert named == NAMES_FAMILIES.get(module, set())


FORBIDDEN_IMPORTS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "ruamel"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {"torch.load", "torch.save", "np.fromstring", "os.system"}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@each_module
def test_nothing_is_unpickled_or_evaluated(module: str) -> None:
    assert not {name.split(".")[0] for name, _ in imports(module)} & FORBIDDEN_IMPORTS
    for call in calls(ast.parse(MODULES[module].read_text("utf-8"))):
        called, where = ast.unparse(call.func), f"{module}:{call.lineno}"
        assert called not in FORBIDDEN_CALLS | FORBIDDEN_METHODS, where
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("trust_remote_code", "False") == "False", where
        assert keywords.get("allow_pickle", "False") == "False", where
        assert keywords.get("weights_only", "True") == "True", where
        if called.endswith("from_pretrained"):
            assert keywords.get("trust_remote_code") == "False", where
            assert keywords.get("local_files_only") == "True", where


def undocumented(module: str) -> Iterator[str]:
    """Public names without a docstring. Methods of up to three lines, and torch's own protocol, need none."""
    for node in ast.parse(MODULES[module].read_text("utf-8")).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{module}:{node.lineno} {node.name}"
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if not isinstance(method, ast.FunctionDef) or method.name.startswith("_") or ast.get_docstring(method):
                continue
            lines = method.body[-1].end_lineno - method.body[0].lineno + 1  # type: ignore[operator]
            if lines > 3 and method.name not in ("forward", "backward"):
                yield f"{module}:{method.lineno} {node.name}.{method.name}"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "intaglio.errors"])
def test_every_module_and_every_public_function_is_documented(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    assert not tree.body or ast.get_docstring(tree)
    assert not list(undocumented(module))


def test_the_tree_of_exceptions_is_drawn_in_full() -> None:
    classes = {name: c for name, c in vars(errors).items() if isinstance(c, type) and c.__module__ == "intaglio.errors"}
    assert set(re.findall(r"\b\w+Error\b", errors.__doc__ or "")) >= set(classes)
    assert {name for name in intaglio.__all__ if name.endswith("Error")} == set(classes)
    assert {c.exit_code for c in classes.values()} == {1, 2, 3}


def test_type_checkers_see_the_names_that_are_loaded_at_run_time() -> None:
    body = ast.parse((SOURCE / "__init__.py").read_text("utf-8")).body
    block = next(node for node in body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    loaded = {
        name: f"intaglio.{home}.{intaglio._AT_HOME.get(name, name)}"
        for home, names in intaglio._HOMES.items()
        for name in names
    }
    assert seen == loaded
    assert sorted(seen) == sorted(intaglio.__all__) == dir(intaglio)


def test_every_public_name_has_a_home() -> None:
    for name in intaglio.__all__:
        assert callable(getattr(intaglio, name))
    for name in intaglio.__all__:  # importing the others must not have put a module in its place
        assert isinstance(getattr(intaglio, name), type | FunctionType)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        intaglio.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("from intaglio.cli import app\napp(['--help'], standalone_mode=False)", ["torch", "numpy", "transformers"]),
        ("from intaglio import make_plan, Recipe", ["transformers", "gguf", "accelerate", "intaglio.train"]),
        ("from intaglio import export_gguf", ["intaglio.train", "intaglio.numerics.fit", "accelerate"]),
    ],
)
def test_what_an_import_leaves_alone(statement: str, absent: list[str]) -> None:
    program = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
