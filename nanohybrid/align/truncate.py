"""Truncated traces: what teaches a model to answer when its thinking is cut short.

A thinking budget ends a trace at a newline wherever the model is. A model that has only seen finished traces goes on thinking in
its answer then. So a share of the training traces (5 % in the paper, more for a tiny model) is cut after some of its lines, with
the final answer kept. The `</think>` after a cut carries no loss: where to stop is the budget's decision and must not be learned.
"""

import random


def truncate(trace: str, lines: int) -> str:
    """The first `lines` lines of a trace."""
    return "\n".join(trace.split("\n")[:lines])


def truncated(trace: str, rng: random.Random) -> str:
    """The trace cut after a number of lines drawn evenly from none to all but the last."""
    return truncate(trace, rng.randrange(trace.count("\n") + 1))
