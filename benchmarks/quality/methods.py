"""The rows of the quality table: what each is called, which script makes it, and in which environment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

MAIN = ""  # the environment that this runs in: intaglio's own, with llama-cpp-python and torchao
SHORT, LONG = "131072", "2097152"  # training tokens; the long ones take hours on a CPU


@dataclass(frozen=True)
class Method:
    """A row. label: in the table. script, options: what makes it; environment: whose Python runs the script.

    recipe: of intaglio, whose embeddings a method gets that leaves its own in floats.
    grid: recipe on which `intaglio convert` finds the codes again, exactly, and writes them as GGUF; None for codes
    that no GGUF type holds. latents_of: a method whose trained floats this one quantizes.
    """

    label: str
    script: str
    options: tuple[str, ...] = ()
    environment: str = MAIN
    embeddings: str = "Q6_K"
    recipe: str = "q4_0"
    grid: str | None = None
    latents_of: str | None = None


def embedding_settings(model: Path, stock: bool = False) -> list[str]:
    """Settings of a recipe of GGUF for this model: rows that Q6_K cannot hold, such as Gemma 3 270M's, are in Q8_0."""
    if json.loads((model / "config.json").read_text("utf-8"))["hidden_size"] % 256 == 0:
        return []
    return [f"weights.token_embedding.grid=q8_0{'-free' if stock else ''}"]


def llama(label: str, *options: str, **how: str) -> Method:
    return Method(label, "llama", options, **how)


def ours(label: str, how: str, recipe: str = "q4_0", tokens: str = "0") -> Method:
    embeddings = {"q4_0": "Q6_K", "q2_0": "Q2_0, PLE Q4_0", "mobile": "2 bits, PLE 4 bits"}[recipe]
    return Method(label, "ours", (how, recipe, tokens), embeddings=embeddings, recipe=recipe)


def peer(label: str, name: str, *options: str, **how: str) -> Method:
    return Method(label, f"peer_{name}", options, environment=name, **{"embeddings": "float", **how})


def torchao(label: str, loss: str, base: str, tokens: str) -> Method:
    return Method(label, "peer_torchao", (loss, base, tokens, "1e-4"), embeddings="float")


FOUR_BITS = {
    "llama-q4_0": llama("llama.cpp Q4_0", "Q4_0"),
    "llama-q4_0-imatrix": llama("llama.cpp Q4_0, importance matrix", "Q4_0", "imatrix"),
    "hqq": peer("HQQ", "hqq"),
    "autoround": peer("AutoRound", "autoround", grid="q4_0-free"),
    "autoround-gguf": peer("AutoRound, its own GGUF", "autoround", "gguf", embeddings="as it chooses"),
    "gptqmodel": peer("GPTQ of GPTQModel", "gptqmodel", grid="q4_0-free"),
    "llmcompressor": peer("GPTQ of llm-compressor", "llmcompressor", grid="q4_0-free"),
    "torchao-ce": torchao("torchao QAT, cross-entropy, 0.13 M tokens", "cross_entropy", "int4", SHORT),
    "torchao-kl": torchao("torchao QAT, KL, 0.13 M tokens", "kl", "int4", SHORT),
    "torchao-kl-intx": torchao("torchao QAT, KL, symmetric, 0.13 M tokens", "kl", "intx", SHORT),
    "torchao-kl-gguf": llama("torchao QAT, KL, 0.13 M tokens, then llama.cpp Q4_0", "Q4_0", latents_of="torchao-kl"),
    "torchao-ce-long": torchao("torchao QAT, cross-entropy, 2 M tokens", "cross_entropy", "int4", LONG),
    "torchao-kl-long": torchao("torchao QAT, KL, 2 M tokens", "kl", "int4", LONG),
    "ours-mse": ours("intaglio, MSE fit", "mse"),
    "ours-gptq": ours("intaglio, GPTQ", "gptq"),
    "ours-layers": ours("intaglio, GPTQ, layers", "layers"),
    "ours-qat": ours("intaglio, GPTQ, QAT, 0.13 M tokens", "qat", tokens=SHORT),
    "ours-qat-long": ours("intaglio, GPTQ, QAT, 2 M tokens", "qat", tokens=LONG),
    "llama-q4_k_m": llama("llama.cpp Q4_K_M", "Q4_K_M"),
    "llama-q4_k_m-imatrix": llama("llama.cpp Q4_K_M, importance matrix", "Q4_K_M", "imatrix"),
    "llama-q5_k_m": llama("llama.cpp Q5_K_M", "Q5_K_M"),
}
TWO_BITS = {
    "two-absmax": ours("intaglio, recipe q2_0, absmax", "absmax", "q2_0"),
    "two-mse": ours("intaglio, recipe q2_0, MSE fit", "mse", "q2_0"),
    "two-gptq": ours("intaglio, recipe q2_0, GPTQ", "gptq", "q2_0"),
    "two-layers": ours("intaglio, recipe q2_0, GPTQ, layers", "layers", "q2_0"),
    "two-qat": ours("intaglio, recipe q2_0, GPTQ, QAT, 0.13 M tokens", "qat", "q2_0", SHORT),
    "two-autoround": peer("AutoRound, the same bits", "autoround", "two", recipe="q2_0"),
}
MOBILE = {
    "mobile-absmax": ours("intaglio, recipe mobile, absmax", "absmax", "mobile"),
    "mobile-mse": ours("intaglio, recipe mobile, MSE fit", "mse", "mobile"),
    "mobile-gptq": ours("intaglio, recipe mobile, GPTQ", "gptq", "mobile"),
    "mobile-layers": ours("intaglio, recipe mobile, GPTQ, layers", "layers", "mobile"),
    "mobile-qat": ours("intaglio, recipe mobile, GPTQ, QAT, 0.13 M tokens", "qat", "mobile", SHORT),
}
METHODS = FOUR_BITS | TWO_BITS | MOBILE
