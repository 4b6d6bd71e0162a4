"""AutoRound with its default 200 iterations: group 32, symmetric, as fake-quantized weights.

python peer_autoround.py MODEL WORK OUT [BITS GROUP]        4 32 by default
python peer_autoround.py MODEL WORK OUT gguf                its own export to GGUF Q4_0
"""

from __future__ import annotations

import torch
from artifact import DEVICE, Making, linears
from auto_round import AutoRound
from auto_round.special_model_handler import _attach_gemma4_rotary_emb
from transformers import AutoTokenizer


def main() -> None:
    making = Making()
    gguf, two = making.options == ["gguf"], making.options == ["two"]
    model, text_NT = making.load(), making.calibration()
    if model.config.model_type == "gemma4_text":  # AutoRound does so for "gemma4" alone, a checkpoint with towers
        _attach_gemma4_rotary_emb(model)
    text = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in text_NT.split(8)]
    scheme = "gguf:q4_0" if gguf else {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    mlps = {name: {"bits": 2, "group_size": 64} for name in linears(model) if ".mlp." in name}
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(making.model_dir),
        scheme=scheme,
        layer_config=mlps if two else None,
        dataset=text,
        nsamples=len(text_NT),
        seqlen=text_NT.shape[1],
        seed=0,
        device_map=DEVICE,
    )
    making.start()
    if gguf:
        rounding.quantize_and_save(str(making.out / "export"), format="gguf:q4_0")
        making.stop()
        (file,) = (making.out / "export").rglob("*.gguf")
        file.rename(making.out / "model.gguf")
    else:
        quantized, _ = rounding.quantize()
        making.stop()
        plain, modules = making.load(), dict(quantized.named_modules())
        for name, module in linears(plain).items():
            module.weight.data = modules[name].weight.data.float()
        making.save(plain)
    facts = {"calibration_tokens": text_NT.numel(), "training_tokens": 0, "bits_a_weight": "mixed" if two else 4.5}
    making.finish("auto-round", **facts)


if __name__ == "__main__":
    main()
