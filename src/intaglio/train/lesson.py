"""The lesson of a batch: the distribution of a teacher, or the text itself.

A lesson is a module. It takes text and the output of a `Teach` for it, and returns the loss. Student and loss are one
module, so that they can be wrapped as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.packed.checkpoint import TextModel
from intaglio.train.distill import chunked_cross_entropy, chunked_kl
from intaglio.train.sharding import final_hidden


class Distiller(nn.Module):
    """Student plus loss as one module, so that both can be wrapped as a whole."""

    def __init__(self, student: TextModel, softcap: float | None, compiled: bool):
        super().__init__()
        self.student = student
        self.softcap = softcap
        self.compiled = compiled

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_head: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """KL to the teacher whose final hidden states [B x T, D] and head are given, else cross-entropy.

        counted: bool [B, T], the places whose next token counts; None for all of them.
        """
        hidden = final_hidden(self.student, input_ids, positions).flatten(0, 1)
        return self.loss(hidden, input_ids, positions, teacher_hidden, teacher_head, counted)

    def loss(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        positions: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """The loss of `forward`, from the student's final hidden states [B x T, D]."""
        head, how = self.student.get_output_embeddings().weight, {"softcap": self.softcap, "compiled": self.compiled}
        if teacher_hidden is not None and teacher_head is not None:
            counted_T = None if counted is None else counted.flatten()
            return chunked_kl(hidden, head, teacher_hidden, teacher_head, counted_T=counted_T, **how)  # type: ignore[arg-type]
        labels = input_ids.roll(-1, 1)
        counted = labels_inside(positions) if counted is None else counted
        return chunked_cross_entropy(hidden, head, labels.flatten(), counted.flatten(), **how)  # type: ignore[arg-type]


def labels_inside(positions: Tensor) -> Tensor:
    """Places [B, T] whose next token is of the same document; bool."""
    inside = positions.roll(-1, 1) > 0  # a position of 0 begins the next document
    inside[:, -1] = False
    return inside


# A function that gives what a lesson needs beside the text, from input_ids and positions [B, T].
Teach = Callable[[Tensor, Tensor], tuple[Any, ...]]


def nothing(input_ids: Tensor, positions: Tensor) -> tuple[Any, ...]:
    """The `Teach` of cross-entropy: nothing is needed beside the text."""
    return ()


class Teacher:
    """The teacher's part in a `Distiller`: its final hidden states [B x T, D] and its head [V, D], in `dtype`.

    dtype: in which products are computed; a teacher that is held in another one runs under autocast.
    """

    def __init__(self, model: TextModel, dtype: torch.dtype):
        self.model, self.dtype = model, dtype

    def __call__(self, input_ids: Tensor, positions: Tensor) -> tuple[Any, ...]:
        # the teacher keeps its own dtype: a cast copy would take its memory once more
        with torch.autocast(input_ids.device.type, self.dtype, enabled=self.model.dtype != self.dtype):
            hidden = final_hidden(self.model, input_ids, positions)
        return hidden.to(self.dtype).flatten(0, 1), self.model.get_output_embeddings().weight.to(self.dtype)
