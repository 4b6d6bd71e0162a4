"""Shares of codes that training changes, counted on a fixed sample of each weight.

A copy of all first codes would take a byte a weight on the GPU. Samples are whole rows, evenly spaced over the whole
weight, so that any number of processes take the same ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from intaglio.packed.store import new_path
from intaglio.train.checkpoint import read_state, write_state
from intaglio.train.latent import BlockLatent
from intaglio.train.latents import Latents
from intaglio.train.sharding import gather_rows, is_main, local, own_slice, world_size

CODES_FILE = "codes.safetensors"  # of a run's folder: samples of the codes that training began with
SAMPLE = 1 << 16  # codes of a weight. Of 250 weights, a share of 0.1% is then known to 1% of itself
Codes = dict[str, Tensor]  # int8 [rows, C] by a weight's name


class CodeChanges:
    """Compares samples of codes. All processes take them together; only the main one has them."""

    def __init__(self, latents: Latents):
        self.latents = latents
        self.first: Codes = {}

    def begin(self, run_dir: Path, resumed: bool) -> None:
        """Keep the first codes in the run's folder, or read those that a run which is resumed kept there."""
        self.first = self.sample()
        if not (self.first and is_main()):
            return
        path = run_dir / CODES_FILE
        if resumed:
            self.first = dict(read_state(path, {name: (t.dtype, tuple(t.shape)) for name, t in self.first.items()}))
            return
        with new_path(path, replace=True, internal=True) as temporary:
            write_state(temporary, self.first)

    @torch.no_grad()
    def sample(self) -> Codes:
        """The codes of the present forward, on the CPU of the main process; empty elsewhere."""
        blocks = self.latents.blocks.items()
        own = {name: sampled(latent) for name, latent in blocks if isinstance(latent.weight, DTensor) or is_main()}
        parts = gather_rows(own) if world_size() > 1 else [own]
        if parts is None:
            return {}
        return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}

    def shares(self, before: Codes) -> dict[str, float]:
        """Shares of codes that differ now: from the first ones, and from those of the sample `before`.

        Empty in other processes than the main one.
        """
        now = self.sample()
        return {"codes_changed": self._share(self.first, now), "codes_moved": self._share(before, now)} if now else {}

    def _share(self, before: Codes, after: Codes) -> float:
        """Share of codes that differ, over all weights by their sizes."""
        sizes = {name: self.latents.blocks[name].weight.numel() for name in before}
        changed = sum(sizes[name] * float((before[name] != after[name]).float().mean()) for name in before)
        return changed / sum(sizes.values())


def sampled(latent: BlockLatent) -> Tensor:
    """Codes int8 [rows, C] of those rows of a weight's sample that this process owns, on the CPU."""
    weight, columns = latent.weight, latent.weight.shape[-1]
    own = local(weight.detach()).reshape(-1, columns)
    rows_of_each = weight.shape[:-1].numel() // weight.shape[0]  # of an expert; 1 for a matrix
    begin = (own_slice(weight).start or 0) * rows_of_each
    apart = max(1, weight.numel() // max(SAMPLE, columns))
    rows = slice(-begin % apart, None, apart)
    return latent.grid.codes_of(own[rows], latent.step.reshape(-1, latent.step.shape[-1])[rows]).cpu()
