"""A web page that chats with the model in the browser: ONNX files, page, and the library that runs them, in one folder.

The page works without a network: Transformers.js and ONNX Runtime are copied in from a folder where npm has
installed them. Both are published as modules that find each other by names which a page alone could
resolve, and a worker cannot; so the names are replaced by paths, once for each build of ONNX Runtime.
"""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from intaglio.errors import InputError
from intaglio.formats.gguf.write_bundles import model_title
from intaglio.formats.onnx.layout import FOLDER, WEB_MODEL
from intaglio.formats.onnx.write import write_onnx
from intaglio.formats.speech import read_speech
from intaglio.formats.turns import sampling
from intaglio.packed.model import PackedModel
from intaglio.packed.store import new_path

LIBRARY, RUNTIME = "@huggingface/transformers", "onnxruntime-web"
LIBRARY_VERSION = "4.3.1"
INSTALL = f"npm install --ignore-scripts {LIBRARY}@{LIBRARY_VERSION}"
# ONNX Runtime's builds by device, with the binaries that they load
BUILDS = {
    "wasm": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
IMPORTS = ('"onnxruntime-web/webgpu"', '"onnxruntime-common"')  # a build has all of onnxruntime-common in it
PAGE = ("index.html", "style.css", "page.js", "worker.js", "serve.py")


def export_web(
    packed: PackedModel, path: str | Path, *, transformers_js: str | Path | None = None, replace: bool = False
) -> None:
    """Write the folder `path`; `python serve.py` in it shows the page.

    transformers_js: a folder with `node_modules`, or that itself, where npm has installed Transformers.js.
    Raises InputError where that is missing or of another version, and what `export_onnx` raises.
    """
    modules = node_modules(transformers_js)
    with new_path(Path(path), replace=replace) as temporary:
        write_onnx(packed, temporary / WEB_MODEL)
        size = sum(file.stat().st_size for file in (temporary / WEB_MODEL / FOLDER).iterdir())
        for name in PAGE:
            (temporary / name).write_bytes((files("intaglio.formats.onnx") / "page" / name).read_bytes())
        versions = copy_library(modules, temporary / "vendor")
        about = {
            "name": model_title(packed),
            "recipe": packed.plan.recipe.name,
            "bytes": size,
            "devices": devices(packed),
            "sampling": sampling(read_speech(packed.path, {})),
            "vendor": versions,
        }
        (temporary / "model.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")


def devices(packed: PackedModel) -> list[str]:
    """Backends that can run the model: ONNX Runtime keeps no int8 cache on a GPU from one step to the next."""
    static = packed.read_static()
    int8_cache = any(static[scale.name] for scale in packed.plan.static_scales if scale.kind.endswith("cache"))
    return ["wasm"] if int8_cache else ["webgpu", "wasm"]


def node_modules(folder: str | Path | None) -> Path:
    """The folder `node_modules` with Transformers.js. InputError says how to get one."""
    if folder is None:
        raise InputError(f"the page needs Transformers.js: run `{INSTALL}` and give --transformers-js node_modules")
    path = Path(folder)
    modules = path / "node_modules" if (path / "node_modules").is_dir() else path
    found = _version(modules, LIBRARY)
    if found != LIBRARY_VERSION:
        have = f"has {LIBRARY} {found}" if found else f"has no {LIBRARY}"
        raise InputError(f"{folder}: {have}, expected {LIBRARY_VERSION}: run `{INSTALL}` there")
    return modules


def _version(modules: Path, package: str) -> str | None:
    try:
        return str(json.loads((modules / package / "package.json").read_text("utf-8"))["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def copy_library(modules: Path, vendor: Path) -> dict[str, Any]:
    """Fill the folder `vendor`; returns the versions of what is in it."""
    vendor.mkdir()
    library = (modules / LIBRARY / "dist" / "transformers.web.min.js").read_text("utf-8")
    for device, build in BUILDS.items():
        text = library
        for name in IMPORTS:
            if name not in text:
                raise InputError(f"{modules}: {LIBRARY} does not import {name}: run `{INSTALL}` there")
            text = text.replace(name, f'"./{build[0]}"')
        (vendor / f"transformers.{device}.js").write_text(text, "utf-8")
        for file in build:
            shutil.copyfile(modules / RUNTIME / "dist" / file, vendor / file)
    shutil.copyfile(modules / LIBRARY / "LICENSE", vendor / "LICENSE.transformers.js")
    (vendor / "README.md").write_text(VENDOR_README, "utf-8")
    return {package: _version(modules, package) for package in (LIBRARY, RUNTIME)}


VENDOR_README = f"""# Not ours

- `transformers.*.js`: {LIBRARY} {LIBRARY_VERSION} (Apache-2.0, see LICENSE.transformers.js), its
  `dist/transformers.web.min.js` with imports by name replaced by paths.
- `ort*`: {RUNTIME} (MIT, Microsoft Corporation), files of its `dist` as they are.
"""
