"""LiteRT-LM's own engine writes on after a prompt, greedily, on the CPU: `litert_lm_text.py BUNDLE PROMPT TOKENS OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import litert_lm


def main() -> None:
    bundle, prompt, tokens, out = sys.argv[1:]
    greedy = litert_lm.SamplerConfig(top_k=1)
    with litert_lm.Engine(bundle, backend=litert_lm.Backend.CPU()) as engine:
        session = engine.create_session(
            apply_prompt_template=False, sampler_config=greedy, max_output_tokens=int(tokens)
        )
        with session:
            session.run_prefill([prompt])
            Path(out).write_text(session.run_decode().texts[0], "utf-8")


if __name__ == "__main__":
    main()
