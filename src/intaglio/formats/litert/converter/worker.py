"""The program that `export litert` runs in LiteRT's own environment: a packed model in, a .litertlm bundle out.

    python -m intaglio.formats.litert.converter.worker PACKED OUT --context-tokens N --prefill-tokens N

Mistakes of the user's are one line on stderr that begins with ERROR_MARK, and exit code 2.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path

from intaglio.errors import InputError, IntaglioError
from intaglio.formats.litert.converter import ERROR_MARK


def main() -> None:
    """The command line of `formats.litert.write`, and of nobody else."""
    parser = argparse.ArgumentParser()
    parser.add_argument("packed", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--context-tokens", type=int, required=True)
    parser.add_argument("--prefill-tokens", type=int, nargs="+", required=True)
    args = parser.parse_args()
    try:
        check_versions(Path(__file__).with_name("requirements.txt"))
        build(args.packed, args.out, context_tokens=args.context_tokens, prefill_tokens=tuple(args.prefill_tokens))
    except IntaglioError as error:
        print(f"{ERROR_MARK}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"{ERROR_MARK}{error.filename or args.out}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def check_versions(requirements: Path) -> None:
    """Raise InputError for a package that is missing or of another version than the exporter was written for."""
    for name, expected in re.findall(r"^([\w-]+)==(\S+)$", requirements.read_text("utf-8"), re.MULTILINE):
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            found = "none"
        if found != expected:
            raise InputError(
                f"{sys.executable}: has {name} {found}, expected {expected}: make the environment anew, or "
                f"`{sys.executable} -m pip install -r {requirements.resolve()}`"
            )


def build(packed_path: Path, out: Path, *, context_tokens: int, prefill_tokens: tuple[int, ...]) -> None:
    """Write the bundle `out`, with its parts in files beside it."""
    from intaglio.formats.litert.converter import bundle, files, fill, graph, tables, trace, weights
    from intaglio.packed.model import PackedModel

    packed = PackedModel.open(packed_path).text_only()
    source, config = weights.Weights(packed), packed.plan.model.config
    model = graph.Model.parse(trace.trace(packed.plan, context_tokens=context_tokens, prefill_tokens=prefill_tokens))
    fill.fill(model, source.stored, packed.read_static())
    embedding = [source.stored(source.embedding)]
    models = {
        "prefill_decode": model,
        "embedder": tables.lookup_model("embedder", embedding, config["hidden_size"] ** 0.5, per_layer=False),
    }
    for tensor in packed.plan:
        if tensor.spec.role == "ple_embedding":
            factor = config["hidden_size_per_layer_input"] ** 0.5
            slices = source.slices(tensor.name)
            models["per_layer_embedder"] = tables.lookup_model("per_layer_embedder", slices, factor, per_layer=True)
    paths = {name: out.with_name(f"{name}.tflite") for name in models}
    for name, path in paths.items():
        files.write_tflite(models[name], source, path)
    identity = f"{packed.sha256()} {context_tokens} {prefill_tokens}"
    digest = packed.plan.digest
    bundle.write_bundle(
        paths, packed.path, config, out, context_tokens=context_tokens, identity=identity, plan_digest=digest
    )


if __name__ == "__main__":
    main()
