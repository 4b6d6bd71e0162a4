"""GPTQ by llm-compressor: W4A16 with group 32, symmetric, static activation order off; bfloat16 as the original is.

Its sequential pipeline stops at the first Gemma 4 layer that shares keys and values with an earlier one (KeyError:
'sliding_attention'). Such a model takes the pipeline "basic", in which every linear sees the original's inputs.

python peer_llmcompressor.py MODEL WORK OUT
"""

from __future__ import annotations

import torch
from artifact import Making
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier


def main() -> None:
    making = Making()
    model, text_NT = making.load(torch.bfloat16), making.calibration()
    weights = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True, actorder=None)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*per_layer_model_projection"])
    rows = Dataset.from_dict({"input_ids": text_NT.tolist(), "attention_mask": torch.ones_like(text_NT).tolist()})
    shares = getattr(model.config, "num_kv_shared_layers", 0)
    oneshot(
        model=model,
        pipeline="basic" if shares else "sequential",
        dataset=rows,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=text_NT.shape[1],
    )
    making.stop()
    model.save_pretrained(making.out / "checkpoint", save_compressed=True)
    making.add_tokenizer(making.out / "checkpoint")
    making.finish(
        "llmcompressor", "compressed-tensors", calibration_tokens=text_NT.numel(), training_tokens=0, bits_a_weight=4.5
    )


if __name__ == "__main__":
    main()
