"""Truncated reasoning traces, which teach a model to answer when its thinking is cut short (paper, section
3.4).

At inference a thinking budget ends a trace at a newline, wherever the model is. A model trained on finished
traces only then continues to think in its answer. So a share of the training traces (5 % in the paper, more
for a tiny model) is cut after some of its lines, followed by the full answer. The `</think>` after a cut has
no loss: the budget decides where a trace ends, not the model.
"""

import random


def truncate(trace: str, lines: int) -> str:
    """The first `lines` lines of a trace."""
    return "\n".join(trace.split("\n")[:lines])


def truncate_randomly(trace: str, rng: random.Random) -> str:
    """A trace cut after a number of lines drawn uniformly from 0 to all but the last."""
    return truncate(trace, rng.randrange(trace.count("\n") + 1))
