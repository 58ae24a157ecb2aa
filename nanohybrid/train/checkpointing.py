"""Activation checkpointing of a model's layers: less activation memory for a second forward pass.

A checkpointed layer saves only its input and runs again in the backward pass. Activation memory then grows
with the number of layers times the hidden size, and not with everything that a layer computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(layers: nn.ModuleList, every: int = 1) -> Iterator[None]:
    """Within the context, every `every`-th layer recomputes its activations in the backward pass; 0 changes
    nothing.

    Names of parameters do not change.
    """
    chosen = list(layers)[::every] if every else []
    for layer in chosen:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward  # the method of the class is visible again
