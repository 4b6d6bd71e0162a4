"""AutoRound with its default 200 iterations: group 32, symmetric, as fake-quantized weights.

python peer_autoround.py MODEL WORK OUT [BITS GROUP]        4 32 by default
python peer_autoround.py MODEL WORK OUT gguf                its own export to GGUF Q4_0
"""

from __future__ import annotations

import torch
from artifact import Making, linears
from auto_round import AutoRound
from transformers import AutoTokenizer


def main() -> None:
    making = Making()
    gguf = making.options == ["gguf"]
    bits, group = (4, 32) if gguf else map(int, making.options or ("4", "32"))
    model, text_NT = making.load(), making.calibration()
    text = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in text_NT.split(8)]
    scheme = "gguf:q4_0" if gguf else {"bits": bits, "group_size": group, "sym": True, "data_type": "int"}
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(making.model_dir),
        scheme=scheme,
        dataset=text,
        nsamples=len(text_NT),
        seqlen=text_NT.shape[1],
        seed=0,
        device_map="cpu",
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
    facts = {"calibration_tokens": text_NT.numel(), "training_tokens": 0, "bits_a_weight": bits + 16 / group}
    making.finish("auto-round", **facts)


if __name__ == "__main__":
    main()
