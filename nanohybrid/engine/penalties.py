"""Logits processors: penalties for tokens that were seen, and a bias, applied before a token is chosen.

    l = l / r where l is positive, else l * r        r: repetition_penalty, for tokens of the prompt or the
    answer l = l - count * frequency_penalty - (count > 0) * presence_penalty        count: in the answer l =
    l + logit_bias

This is what transformers and vLLM compute. Only cells (row, token) of tokens that were seen are touched, so
the cost is that of the tokens seen, not of the vocabulary.

S rows (sequences) · V vocabulary · C cells.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanohybrid.engine.params import SamplingParams


class TokenHistory(NamedTuple):
    """The ids of a request: its prompt, and the list of its answer, which grows."""

    prompt: Sequence[int]
    tokens: Sequence[int]


class LogitsProcessors:
    """The penalties and biases of the rows of a batch.

    `apply` counts the tokens written since its last call.
    """

    def __init__(
        self, params: Sequence[SamplingParams], history: Sequence[TokenHistory], device: torch.device | str
    ) -> None:
        self._device = device
        self._repetition_S = np.array([p.repetition_penalty for p in params], dtype=np.float32)
        self._frequency_S = np.array([p.frequency_penalty for p in params], dtype=np.float32)
        self._presence_S = np.array([p.presence_penalty for p in params], dtype=np.float32)
        self._answers = [(row, history[row].tokens) for row, p in enumerate(params) if p.penalized]
        self._counted = [0] * len(self._answers)
        self._cell: dict[tuple[int, int], int] = {}
        self._at_C2 = np.zeros((64, 2), dtype=np.int64)  # row and token of each cell; grows by doubling
        self._count_C = np.zeros(64, dtype=np.float32)
        for row, p in enumerate(params):
            if p.repetition_penalty != 1:
                for token in history[row].prompt:
                    self._cell_of(row, token)
        bias = [(row, token, value) for row, p in enumerate(params) for token, value in p.bias]
        self._bias_at_C2 = torch.tensor(
            [(row, token) for row, token, _ in bias], dtype=torch.long, device=device
        ).view(-1, 2)
        self._bias_C = torch.tensor([value for _, _, value in bias], dtype=torch.float32, device=device)

    def apply(self, logits_SV: Tensor) -> Tensor:
        """The processed logits [S, V]; the given ones stay as they are."""
        logits_SV = logits_SV.clone()
        self._count()
        if used := len(self._cell):
            at_C2 = self._at_C2[:used]
            row_C, token_C = torch.from_numpy(at_C2).to(self._device).unbind(1)
            repetition_C, frequency_C, presence_C = (
                torch.from_numpy(values_S[at_C2[:, 0]]).to(self._device)
                for values_S in (self._repetition_S, self._frequency_S, self._presence_S)
            )
            count_C = torch.from_numpy(self._count_C[:used]).to(self._device)
            seen_C = logits_SV[row_C, token_C]
            seen_C = torch.where(seen_C > 0, seen_C / repetition_C, seen_C * repetition_C)
            logits_SV[row_C, token_C] = seen_C - count_C * frequency_C - (count_C > 0) * presence_C
        if len(self._bias_C):
            row_C, token_C = self._bias_at_C2.unbind(1)
            inside_C = token_C < logits_SV.shape[1]
            logits_SV[row_C[inside_C], token_C[inside_C]] += self._bias_C[inside_C]
        return logits_SV

    def _count(self) -> None:
        for index, (row, tokens) in enumerate(self._answers):
            for token in tokens[self._counted[index] :]:
                cell = self._cell_of(row, token)  # may replace the arrays
                self._count_C[cell] += 1
            self._counted[index] = len(tokens)

    def _cell_of(self, row: int, token: int) -> int:
        cell = self._cell.get((row, token))
        if cell is None:
            cell = self._cell[row, token] = len(self._cell)
            if cell == len(self._count_C):
                self._at_C2 = np.concatenate([self._at_C2, np.zeros_like(self._at_C2)])
                self._count_C = np.concatenate([self._count_C, np.zeros_like(self._count_C)])
            self._at_C2[cell] = row, token
        return cell
