"""Random inputs of the SSD scan by name: T tokens, S sequences, H heads, P head dimension, G groups, N state size."""

import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout


def inputs(layout: Layout, H: int, P: int, G: int, N: int, state: bool = True) -> dict[str, Tensor]:
    T = layout.tokens
    tensors = {
        "x_THP": torch.randn(T, H, P),
        "dt_TH": torch.rand(T, H) * 0.5,
        "A_H": -torch.rand(H) * 8,
        "B_TGN": torch.randn(T, G, N),
        "C_TGN": torch.randn(T, G, N),
        "D_H": torch.randn(H),
    }
    return tensors | ({"initial_SHPN": torch.randn(layout.sequences, H, P, N)} if state else {})
