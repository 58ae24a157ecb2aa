"""The tensors that every form of the SSD scan takes, in one struct."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SSDInputs(NamedTuple):
    """The inputs of an SSD scan; gradients of a scan come in the same struct.

    T tokens, S sequences, H heads, P head dimension, G groups, N state size. dt: after softplus. A: negative.
    initial: the state that each sequence starts from; None is zeros.
    """

    x_THP: Tensor
    dt_TH: Tensor
    A_H: Tensor
    B_TGN: Tensor
    C_TGN: Tensor
    D_H: Tensor
    initial_SHPN: Tensor | None = None
