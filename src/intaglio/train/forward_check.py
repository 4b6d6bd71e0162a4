"""Checks that a model in training computes what ships, by one short text through it and a plain model of its weights.

What is packed are weights and static scales, and whoever loads them computes with transformers' own modules. A hook, a
patched forward or another activation in the model in training is in neither, so it would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from intaglio.errors import MismatchError
from intaglio.plan.family import transformers_config
from intaglio.plan.files import one_line
from intaglio.train.latents import Latents, owners_of
from intaglio.train.sharding import world_size
from intaglio.train.static import StaticScales, attach_static, bare_path, fix_scales, read_scales, switch_static

TOKENS = 24
# Root mean square difference of one module's output, as a share of the output, where sums have another order: 4 last
# bits of 16-bit floats; 64 of float32, in which long rows are summed; and where codes of activations may move.
ROUNDING = {torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11, torch.float32: 64 * 2**-23}
OF_CODES = 0.01
ATTENTION_KINDS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
See = Callable[[str, nn.Module, Tensor], Tensor | None]


@torch.no_grad()
def check_forward(latents: Latents) -> None:
    """Raise MismatchError, with the first module that differs, if the model does not compute what would be packed.

    TOKENS tokens pass in evaluation mode. Each module of the plain model gets what the same module of the model in
    training got, so that roundings do not add up, and must give the same but for ROUNDING; then without static scales
    too, whose codes turn a last bit into much. Drafters, which need a target's states, and models over several
    processes are not run.
    """
    if latents.plan.model.family.drafter or world_size() > 1:
        return
    model = latents.model
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    plain = plain_model(latents, model)
    device = next(plain.parameters()).device
    vocabulary = int(latents.plan.model.layer_config.vocab_size)
    tokens = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    with _as_it_ships(model):
        for on in (True, False) if latents.plan.static_scales else (False,):
            for each in (model, plain):
                switch_static(each, activations=on, kv_cache=on)
            if _compare(model, plain, tokens, OF_CODES if on else 0.0):
                return


def _compare(model: Any, plain: Any, tokens: Tensor, allowed: float) -> bool:
    """Whether all modules give the same bits. MismatchError for one that differs by more than `allowed` or rounding."""
    outputs: dict[str, Tensor] = {}
    dtypes: list[torch.dtype] = []

    def keep(path: str, module: nn.Module, output: Tensor) -> None:
        outputs[path] = output.clone()  # of an adapted linear, what the adapter's module around it gives
        dtypes.extend([output.dtype] if isinstance(module, nn.Linear) else [])

    _run(model, tokens, keep)
    dtype = dtypes[0] if dtypes and dtypes[0] in (torch.bfloat16, torch.float16) else plain.dtype  # under autocast
    bound, differing, equal = max(allowed, ROUNDING.get(dtype, 0.0)), list[str](), list[bool]()

    def compare(path: str, module: nn.Module, output: Tensor) -> Tensor | None:
        if path not in outputs:
            return None  # someone's forward goes round this module; the one around it is compared
        found = outputs[path]
        if found.shape == output.shape:
            equal.append(torch.equal(found.float(), output.float()))
            mine, plain_one = (x.float().nan_to_num() for x in (found, output))  # packing names a weight that is NaN
            if (mine - plain_one).square().mean().sqrt() <= bound * plain_one.square().mean().sqrt():
                return found.to(output.dtype)
        differing.append(path)
        return None

    _run(plain, tokens, compare, autocast=dtype)
    if differing:
        raise MismatchError(
            f"{differing[0] or type(model).__name__}: computes something else than transformers' own module with the "
            "same weights: a hook, a patched forward, a replaced module or a rotary table rounded by a cast of the "
            "whole model is not in what is packed: remove it, or build it into the weights before prepare()"
        )
    return all(equal)


def plain_model(latents: Latents, model: Any) -> Any:
    """transformers' model of the plan's config, which shares the weights of the model in training, with its scales."""
    from transformers import AutoModelForCausalLM

    plan = latents.plan
    kind = getattr(model.config, "_attn_implementation", None)
    with init_empty_weights(include_buffers=False):
        plain = AutoModelForCausalLM.from_config(
            transformers_config(plan.model.config),
            dtype=model.dtype,
            attn_implementation=kind if kind in ATTENTION_KINDS else "sdpa",
        )
    owners = owners_of(model)
    own = {tensor.name: getattr(*owners[tensor.name]).detach() for tensor in plan if tensor.name in owners}
    for tensor in plan:
        found = own.get(tensor.name)
        if found is None or found.shape != tensor.spec.shape:
            now = "no longer in the model" if found is None else f"{list(found.shape)} in the model now"
            raise MismatchError(
                f"{tensor.name}: prepared as {list(tensor.spec.shape)}, but {now}: a module was removed or resized: "
                "change the model first, then prepare it"
            )
    plain.load_state_dict(own, assign=True, strict=False)
    plain.tie_weights()
    plain.to(next(iter(own.values())).device).requires_grad_(False).eval()
    attach_static(plain, plan)
    fix_scales(plain, plan, read_scales(model, plan))
    return plain


@contextmanager
def _as_it_ships(model: nn.Module) -> Iterator[None]:
    """Let a model run in evaluation mode and not compiled; its modes and switches are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    scales = [(module, module.on) for module in model.modules() if isinstance(module, StaticScales)]
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, on in scales:
            module.on = on


def _run(model: Any, tokens: Tensor, see: See, autocast: torch.dtype | None = None) -> None:
    """Run tokens [1, T]. see: is given each module's path and output, and may return another output."""

    def hook(path: str) -> Any:
        def seen(module: nn.Module, inputs: Any, output: Any) -> Any:
            tensor = getattr(output, "logits", output)  # of the whole model
            changed = see(path, module, tensor) if isinstance(tensor, Tensor) else None
            return changed if tensor is output else None

        return seen

    held = next(model.parameters()).dtype
    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.callback(module.register_forward_hook(hook(bare_path(path))).remove)
        own = autocast is not None and autocast != held
        stack.enter_context(torch.autocast(tokens.device.type, autocast if own else torch.bfloat16, enabled=own))
        try:
            model(input_ids=tokens, use_cache=False)
        except Exception as error:  # of anyone's modules
            raise MismatchError(
                f"the model cannot run a text of {TOKENS} tokens, which is compared before it is packed: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
