"""Log-probabilities of a prompt's own tokens: log_softmax(logits) at each position, of the next token.

The logits of a prompt of 128k tokens would take 64 GiB. They are computed for a few positions at a time, and
only what was asked for is stored. Temperature, penalties and bias are not applied, since nothing is sampled.

T tokens of a prompt or chunk · R rows of logits at a time · E hidden width · V vocabulary.
"""

import torch
from torch import Tensor

from nanohybrid.engine.params import Top
from nanohybrid.model import HybridLM

LOGITS = 1 << 22  # logits at a time: 16 MiB in fp32, and about three times that with their softmax


class PromptScores:
    """The scores of one prompt, which grow as its chunks are computed. Entry i is of token i + 1.

    alternatives: how many of the most probable tokens are stored for each position.
    """

    def __init__(self, prompt: list[int], alternatives: int = 0) -> None:
        self.prompt, self.alternatives = prompt, alternatives
        self.logprobs: list[float] = []
        self.top: Top = []

    def add(self, model: HybridLM, hidden_TE: Tensor, start: int) -> None:
        """Add the scores of a chunk. hidden_TE: its hidden states, from position `start` of the prompt on.

        Positions after the prompt are ignored.
        """
        following = self.prompt[start + 1 : start + 1 + len(hidden_TE)]
        rows = max(LOGITS // model.config.vocab_size, 1)
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
