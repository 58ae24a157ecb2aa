"""The losses of a distillation: forward KL on the logits, with hidden states, or from a teacher's stored
top-k tokens.

    minimize  mean over tokens of KL(teacher || student) at temperature tau

in chunks that never hold [tokens, vocabulary].

T tokens · R tokens that count in the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanohybrid.data import Batch
from nanohybrid.data.packing import IGNORED
from nanohybrid.distill.hidden_state_loss import HiddenStateLoss
from nanohybrid.distill.teacher import CachedTeacherBatch, Teacher
from nanohybrid.model import HybridLM
from nanohybrid.ops.losses import chunked_forward_kl, summed_forward_kl, summed_top_k_kl


def kl_loss(
    teacher: Teacher, temperature: float, train_on_prompt: bool, hidden_states: HiddenStateLoss | None = None
) -> Callable[[HybridLM, Batch], tuple[Tensor, int]]:
    """The training loss: a function of student and batch that returns the loss summed over tokens, and how
    many they are.

    hidden_states: a loss on hidden states, added with its weight.
    """

    def logits_alone(student: HybridLM, batch: Batch) -> tuple[Tensor, int]:
        with torch.no_grad():
            teacher_TE = teacher.hidden(batch.tokens_T, batch.layout)
        return of_logits(student, batch, student.hidden(batch.tokens_T, batch.layout), teacher_TE)

    def with_hidden_states(student: HybridLM, batch: Batch) -> tuple[Tensor, int]:
        assert hidden_states is not None
        student_TE, teacher_TE, distance_T = hidden_states.run(student, teacher, batch)
        kl, count = of_logits(student, batch, student_TE, teacher_TE)
        mask_T, _ = loss_mask(batch, train_on_prompt)
        distance = (distance_T if mask_T is None else distance_T[mask_T]).sum()
        return kl + hidden_states.recipe.weight * distance, count

    def of_logits(
        student: HybridLM, batch: Batch, student_TE: Tensor, teacher_TE: Tensor
    ) -> tuple[Tensor, int]:
        mask_T, count = loss_mask(batch, train_on_prompt)
        kl = summed_forward_kl(
            student_TE, student.head_weight, teacher_TE, teacher.head_weight, temperature, mask_T
        )
        return kl, count

    return logits_alone if hidden_states is None else with_hidden_states


def top_k_kl_loss(student: HybridLM, batch: CachedTeacherBatch, temperature: float) -> tuple[Tensor, int]:
    """The KL from a teacher's stored top-k tokens, summed over the tokens that count, and how many they
    are."""
    hidden_TE = student.hidden(batch.batch.tokens_T, batch.layout)
    kl = summed_top_k_kl(hidden_TE, student.head_weight, batch.rows_R, batch.top_k, temperature)
    return kl, len(batch.rows_R)


def loss_rows(batch: Batch, train_on_prompt: bool) -> Tensor:
    """[R]: the tokens of a batch that count in the loss, ascending, on the batch's device."""
    mask_T, count = loss_mask(batch, train_on_prompt)
    if mask_T is None:
        return torch.arange(count, device=batch.tokens_T.device)
    return mask_T.nonzero().squeeze(1)


def loss_mask(batch: Batch, train_on_prompt: bool) -> tuple[Tensor | None, int]:
    """Which tokens [T] of a batch count in the loss (None: all), and how many they are."""
    if train_on_prompt:
        return None, batch.layout.tokens
    return batch.targets_T != IGNORED, batch.target_count


@torch.no_grad()
def mean_kl(
    student: HybridLM, teacher: Teacher, batches: list[Batch], train_on_prompt: bool = False
) -> float:
    """KL(teacher || student) of a token, in nats, over some batches."""
    total, count = 0.0, 0
    for batch in (batch.to(student.device) for batch in batches):
        mask_T, tokens = loss_mask(batch, train_on_prompt)
        student_TE, teacher_TE = (model.hidden(batch.tokens_T, batch.layout) for model in (student, teacher))
        kl_T = chunked_forward_kl(
            student_TE, student.head_weight, teacher_TE, teacher.head_weight, mask_T=mask_T
        )
        total += kl_T.double().sum().item()
        count += tokens
    return total / max(count, 1)
