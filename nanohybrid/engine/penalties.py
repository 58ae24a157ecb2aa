"""What a request adds to its logits before anything is chosen: penalties for tokens seen, and a bias.

    l = logit / r where it is positive, logit * r where not      r: repetition_penalty, of tokens in the prompt or written
    l = l - count * frequency_penalty - (count > 0) * presence_penalty     count: how often the token was written
    l = l + logit_bias

Only (row, token) cells that were seen are touched, so the cost is that of the tokens seen, not of the vocabulary.

S rows (sequences) · V vocabulary · C cells.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanohybrid.engine.params import SamplingParams


class Written(NamedTuple):
    """A request's ids: its prompt, and the live list of those written since."""

    prompt: Sequence[int]
    tokens: Sequence[int]


class Edits:
    """The penalties and biases of a batch's rows. Tokens that a row writes are counted at the next `apply`."""

    def __init__(
        self, params: Sequence[SamplingParams], written: Sequence[Written], device: torch.device | str
    ) -> None:
        self._device = device
        self._repetition_S = np.array([p.repetition_penalty for p in params], dtype=np.float32)
        self._frequency_S = np.array([p.frequency_penalty for p in params], dtype=np.float32)
        self._presence_S = np.array([p.presence_penalty for p in params], dtype=np.float32)
        self._written = [(row, written[row].tokens) for row, p in enumerate(params) if p.penalized]
        self._counted = [0] * len(self._written)
        self._cell: dict[tuple[int, int], int] = {}
        self._at_C2 = np.zeros((64, 2), dtype=np.int64)  # row and token of each cell; grows by doubling
        self._count_C = np.zeros(64, dtype=np.float32)
        for row, p in enumerate(params):
            if p.repetition_penalty != 1:
                for token in written[row].prompt:
                    self._cell_of(row, token)
        bias = [(row, token, value) for row, p in enumerate(params) for token, value in p.bias]
        self._bias_at_C2 = torch.tensor(
            [(row, token) for row, token, _ in bias], dtype=torch.long, device=device
        ).view(-1, 2)
        self._bias_C = torch.tensor([value for _, _, value in bias], dtype=torch.float32, device=device)

    def apply(self, logits_SV: Tensor) -> Tensor:
        """The logits with everything added; the given ones are left as they were."""
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
        for index, (row, tokens) in enumerate(self._written):
            for token in tokens[self._counted[index] :]:
                cell = self._cell_of(row, token)  # may make the arrays anew
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
