"""Training over several processes with torch's FSDP2: each owns rows of every weight, and reads only those from disk.

A process that torchrun or accelerate started knows its place from the environment; without them there is one process
and nothing here does anything. FSDP2 shards along rows, and blocks of a grid lie along rows, so each process decodes,
trains and packs what it owns, and sees no other process's latents.

Tables that are looked up, not multiplied by, are kept whole on each process: gathering E2B's table of per-layer
embeddings for every forward would move 4.7 GB to use a few rows of it.
"""

from __future__ import annotations

import os
import secrets
import socket
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from intaglio.errors import InputError
from intaglio.numerics.grid import Quantized
from intaglio.packed.checkpoint import TextModel, stream_rows
from intaglio.plan.family import ModelSpec, transformers_config

LOOKED_UP = "embed_tokens_per_layer"  # tables that no head is tied to


def start_processes() -> torch.device:
    """Join the processes that torchrun or accelerate started, if any, and return this one's device."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        if device.index >= torch.cuda.device_count():
            raise InputError(
                f"process {device.index} of this host, and {torch.cuda.device_count()} GPUs: expected one GPU a "
                "process: start fewer with --nproc-per-node"
            )
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if gpu and not dist.is_nccl_available():
            raise InputError("this torch has no NCCL, over which GPUs train together: start one process")
        try:
            dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
        except dist.DistError as error:
            said = str(error).strip().splitlines()[0][:200]
            raise InputError(f"the processes cannot meet ({said}): check that all hosts reach each other") from error
    return device


def dismiss_processes() -> None:
    """Wait for all processes, then leave the group: from here on this process counts as the only one."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        _groups.clear()


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes logs, reports and whole files."""
    return rank() == 0


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process owns: all of a plain tensor, its shard of a sharded one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_slice(parameter: Tensor) -> slice:
    """The rows of a whole tensor that belong to this process's shard of `parameter`."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return slice(offset[0], offset[0] + shape[0])


def own_rows(value: Quantized | Tensor, parameter: Tensor) -> Quantized | Tensor:
    """This process's rows of a whole value."""
    rows = own_slice(parameter)
    if isinstance(value, Tensor):
        return value[rows] if value.ndim else value
    return rows_of(value, rows)


def rows_of(value: Quantized, rows: slice) -> Quantized:
    """Some rows of a weight on a grid."""
    parts = (value.codes, value.scale, value.super_scale)
    return Quantized(value.grid, *(None if part is None else part[rows] for part in parts))  # type: ignore[arg-type]


def load_own_rows(model_dir: str | Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> TextModel:
    """The text model of a checkpoint folder in `dtype`, in eval mode, of which each process reads its own rows.

    No process and no host ever holds the whole model in floats: it is built without memory, sharded where there are
    several processes, and filled tensor by tensor. Raises ConfigError as `load_model` does.
    """
    model = without_memory(transformers_config(spec.config), dtype)
    model.requires_grad_(False).eval()
    if world_size() > 1:
        shard(model, device)
    allocate(model, device)
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, values in stream_rows(model_dir, spec, {name: own_slice(t) for name, t in targets.items()}):
            local(targets[name]).copy_(values)
    return model


def without_memory(config: Any, dtype: torch.dtype) -> TextModel:
    """transformers' model of its own config object, without memory behind its parameters; buffers have their values."""
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # parameters without memory were replaced, ties among them too
    return model


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give a model that was built without memory its weights, not filled, on `device`; buffers keep their values."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    if not isinstance(model, FSDPModule):
        model.tie_weights()  # type: ignore[operator]
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def like(model: TextModel, device: torch.device) -> TextModel:
    """A model of the same shape and dtype, sharded likewise, with the same values in memory of its own."""
    other = without_memory(model.config, model.dtype)
    shard(other, device)
    allocate(other, device)
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, target in [*other.named_parameters(), *other.named_buffers()]:
            local(target).copy_(local(values[name]))
    return other


def shard(model: TextModel, device: torch.device) -> None:
    """Shard a text model in place, each decoder layer by itself; gradients are averaged in float32."""
    # float32: a mean of bfloat16 gradients over many processes would be rounded to eight bits
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world_size(),))  # all processes in a row
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    whole = {p for name, p in model.named_parameters() if LOOKED_UP in name}
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)
    model.read = types.MethodType(_read, model)
    register_fsdp_forward_method(model, "read")


def _read(self: Any, input_ids: Tensor, positions: Tensor) -> Tensor:
    hidden: Tensor = self.model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state
    return hidden


def final_hidden(model: TextModel, input_ids: Tensor, positions: Tensor) -> Tensor:
    """Output of a text model's final norm, [B, T, D]. Positions that restart keep documents apart."""
    read = getattr(model, "read", None) if isinstance(model, FSDPModule) else None
    return _read(model, input_ids, positions) if read is None else read(input_ids, positions)


def settle(model: Any) -> None:
    """Give back gathered weights after forwards without a backward, so that each process holds its own rows again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def keep_gathered(*models: Any) -> None:
    """Let sharded models keep the weights that a forward gathers until a backward has used them, if one comes."""
    for model in models:
        if isinstance(model, FSDPModule):
            model.set_reshard_after_forward(False)


def check_together(batch_size: int, identity: dict[str, str]) -> None:
    """Raise InputError, on every process alike, where processes cannot train together.

    identity: what all must have in common, by name: recipe, data, model.
    """
    size, found = world_size(), from_all(identity)
    for rank, other in enumerate(found):
        for key, value in found[0].items():
            if other.get(key) != value:
                raise InputError(
                    f"process {rank} has another {key} than process 0: start all with one command, on the same files"
                )
    if batch_size % size:
        raise InputError(
            f"schedule.batch_size = {batch_size} sequences on {size} processes: expected a multiple of {size}: "
            f"choose one with --set schedule.batch_size={-(-batch_size // size) * size}, or start fewer processes"
        )


def check_shared(folder: Path) -> None:
    """Raise InputError, on every process alike, unless all of them see one and the same folder; none is left behind."""
    if world_size() == 1:
        return
    made = is_main() and not folder.exists()
    probe = folder / from_main(f".seen-by-all-{secrets.token_hex(8)}")
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    wait_for_all()
    found = from_all((socket.gethostname(), probe.is_file()))
    if is_main():
        probe.unlink()
        if made:
            folder.rmdir()
    for number, (host, sees) in enumerate(found):
        if not sees:
            raise InputError(
                f"process {number} on {host} does not see {folder}, into which process 0 writes: choose a folder on a "
                "disk that all hosts share"
            )


def from_main(value: Any) -> Any:
    """The main process's value, on all processes."""
    if world_size() == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0, group=_cpu_group())
    return found[0]


def from_all(value: Any) -> list[Any]:
    """The values of all processes, in order, on each of them."""
    found: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value, group=_cpu_group())
    return found


def wait_for_all() -> None:
    """Return once every process is here."""
    if world_size() > 1:
        dist.barrier()


def average_over_processes(tensors: list[Tensor]) -> None:
    """Average each of these tensors over all processes, in place."""
    for tensor in tensors if world_size() > 1 else ():
        dist.all_reduce(tensor)
        tensor /= world_size()


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(value: Any) -> list[Any] | None:
    """On the main process what each process gave, in order; None elsewhere."""
    found: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, found, group=_cpu_group())
    return found


_groups: dict[str, Any] = {}


def _cpu_group() -> Any:
    """A group that moves CPU memory, beside the one that moves a GPU's."""
    if dist.get_backend() == "gloo":
        return None
    if "cpu" not in _groups:
        _groups["cpu"] = dist.new_group(backend="gloo")
    return _groups["cpu"]
