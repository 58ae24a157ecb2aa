"""Stochastic rounding to fp16 with a stateless generator: the same key and element give the same bit on any
device, in any batch.
"""

from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.stochastic import torch as torch_form
from nanohybrid.ops.stochastic.torch import keys

__all__ = ["keys", "to_half"]
NUMBA = Kernel("nanohybrid.ops.stochastic.numba:to_half")


def to_half(x: Tensor, key_S: Tensor, layer: int) -> Tensor:
    """fp32 [S, ...] to fp16, rounded at random so that the mean is preserved. key_S: int32, from `keys`.

    Numbers that fp16 can represent are unchanged; larger ones are clamped to its largest. All forms give the
    same bits.
    """
    form = choose(x, reference=torch_form.to_half, torch=torch_form.to_half, numba=NUMBA)
    half: Tensor = form(x, key_S, layer)
    return half
