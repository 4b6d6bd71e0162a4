"""The device that works on tensors: a GPU where there is one."""

from __future__ import annotations

import torch

Device = torch.device | str | None  # None: what `device_for` finds


def device_for(device: Device = None) -> torch.device:
    """The device that was asked for; without a wish, the GPU of this process, or else the CPU."""
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(device)
