"""What the model thought of a prompt's own tokens: log_softmax(logits) at each position, at the token that follows there.

A prompt of 128k tokens would have 64 GiB of logits. They are made for a few positions at a time, as many as fit a fixed number of
values, and only what was asked for is kept. Temperature, penalties and bias are not applied: nothing was drawn.

Letters: T tokens of a prompt (or piece of one) · R rows of logits at a time · E hidden width · V vocabulary.
"""

import torch
from torch import Tensor

from nanohybrid.engine.params import Top
from nanohybrid.model import HybridLM

VALUES = 1 << 22  # logits at a time: 16 MiB in fp32, and about three times that with their softmax


class PromptScores:
    """Grows as its prompt is computed, piece by piece. Entry i is of the token i + 1: nothing comes before the first."""

    def __init__(self, prompt: list[int], alternatives: int = 0) -> None:
        self.prompt, self.alternatives = prompt, alternatives
        self.logprobs: list[float] = []
        self.top: Top = []

    def take(self, model: HybridLM, hidden_TE: Tensor, start: int) -> None:
        """The hidden states of the positions from `start` on; those of tokens that were written since are left alone."""
        following = self.prompt[start + 1 : start + 1 + len(hidden_TE)]
        rows = max(VALUES // model.config.vocab_size, 1)
        for begin in range(0, len(following), rows):
            ids_R = hidden_TE.new_tensor(following[begin : begin + rows], dtype=torch.long)
            logits_RV = model.head(hidden_TE[begin : begin + len(ids_R)])
            total_R = logits_RV.logsumexp(dim=-1)
            self.logprobs += (logits_RV.gather(1, ids_R[:, None])[:, 0] - total_R).tolist()
            if self.alternatives:
                best = logits_RV.topk(min(self.alternatives, logits_RV.shape[-1]), dim=-1)
                values = (best.values - total_R[:, None]).tolist()
                self.top += [
                    list(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), values, strict=True)
                ]
