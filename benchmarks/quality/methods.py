"""The rows of the quality table: what each is called, which script makes it, and in which environment."""

from __future__ import annotations

from dataclasses import dataclass

MAIN = ""  # the environment that this runs in: intaglio's own, with llama-cpp-python and torchao


@dataclass(frozen=True)
class Method:
    """A row. label: in the table. script, options: what makes it; environment: whose Python runs the script.

    embeddings: what its own artifact has them in. grid: recipe on which `intaglio convert` finds its codes again,
    exactly, and writes them as GGUF; None for codes that no GGUF type holds. latents_of: a method whose floats this
    one quantizes.
    """

    label: str
    script: str
    options: tuple[str, ...] = ()
    environment: str = MAIN
    embeddings: str = "Q6_K"
    grid: str | None = None
    latents_of: str | None = None


def llama(label: str, *options: str) -> Method:
    return Method(label, "llama", options)


def ours(label: str, *options: str) -> Method:
    return Method(label, "ours", options)


def torchao(label: str, loss: str, base: str, tokens: str) -> Method:
    return Method(label, "peer_torchao", (loss, base, tokens, "1e-4"), embeddings="float")


FLOAT = {"embeddings": "float"}
FOUR_BITS = {
    "llama-q4_0": llama("llama.cpp Q4_0", "Q4_0"),
    "llama-q4_0-imatrix": llama("llama.cpp Q4_0, importance matrix", "Q4_0", "imatrix"),
    "hqq": Method("HQQ", "peer_hqq", environment="hqq", **FLOAT),
    "autoround": Method("AutoRound", "peer_autoround", environment="autoround", grid="q4_0-free", **FLOAT),
    "autoround-gguf": Method(
        "AutoRound, its GGUF", "peer_autoround", ("gguf",), environment="autoround", embeddings="Q4_0"
    ),
    "gptqmodel": Method("GPTQ (GPTQModel)", "peer_gptqmodel", environment="gptqmodel", grid="q4_0-free", **FLOAT),
    "llmcompressor": Method(
        "GPTQ (llm-compressor)", "peer_llmcompressor", environment="llmcompressor", grid="q4_0-free", **FLOAT
    ),
    "torchao-ce": torchao("torchao QAT, cross-entropy", "cross_entropy", "int4", "131072"),
    "torchao-kl": torchao("torchao QAT, KL", "kl", "int4", "131072"),
    "torchao-kl-intx": torchao("torchao QAT, KL, symmetric", "kl", "intx", "131072"),
    "torchao-kl-gguf": Method("torchao QAT, KL, then llama.cpp Q4_0", "llama", ("Q4_0",), latents_of="torchao-kl"),
    "ours-mse": ours("intaglio, MSE fit", "mse"),
    "ours-gptq": ours("intaglio, GPTQ", "gptq"),
    "ours-layers": ours("intaglio, GPTQ and layers", "layers"),
    "ours-qat": ours("intaglio, GPTQ and QAT", "qat", "q4_0", "131072"),
    "llama-q4_k_m": llama("llama.cpp Q4_K_M", "Q4_K_M"),
    "llama-q4_k_m-imatrix": llama("llama.cpp Q4_K_M, importance matrix", "Q4_K_M", "imatrix"),
    "llama-q5_k_m": llama("llama.cpp Q5_K_M", "Q5_K_M"),
}
METHODS = FOUR_BITS
