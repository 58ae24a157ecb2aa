"""Activation checkpointing, applied to a model's layers from outside: memory of activations against a second forward.

A checkpointed layer keeps only its input and is run again in backward, so activations grow with the number of layers times the
width of the residual stream and not with everything inside a layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(layers: nn.ModuleList, every: int = 1) -> Iterator[None]:
    """Inside, every `every`-th layer recomputes its activations in backward; 0 changes nothing. Names of parameters stay."""
    chosen = list(layers)[::every] if every else []
    for layer in chosen:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward  # the class's own shows again
