"""Stochastic rounding to fp16 by a generator without a state: the same key and place, the same bit, on any device and in any batch."""

from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.stochastic import torch as torch_form
from nanohybrid.ops.stochastic.torch import keys

__all__ = ["keys", "to_half"]
NUMBA = Kernel("nanohybrid.ops.stochastic.numba:to_half")


def to_half(x: Tensor, key_S: Tensor, layer: int) -> Tensor:
    """[S, ...] in fp32 to fp16, up or down at random so that the mean stays; int32 keys [S] as `keys` makes them of (seed, position).

    What fp16 can hold stays as it is, what exceeds it is cut to its largest number. All forms give the same bits.
    """
    form = choose(x, reference=torch_form.to_half, torch=torch_form.to_half, numba=NUMBA)
    half: Tensor = form(x, key_S, layer)
    return half
