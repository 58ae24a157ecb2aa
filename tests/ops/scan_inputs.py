"""Random inputs of the SSD scan by name, and its forms as functions of them.

T tokens, S sequences, H heads, P head dimension, G groups, N state size.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan.inputs import SSDInputs


def scan_of(
    form: ModuleType, layout: Layout, output_final_state: bool = True
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A form's scan over a layout, as a function of tensors by name."""

    def scan(**tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        return form.ssd_scan(SSDInputs(**tensors), layout, output_final_state)

    return scan


def outputs_of(form: ModuleType, layout: Layout) -> Callable[..., Tensor]:
    """A form's scan without final states, as in training."""

    def scan(**tensors: Tensor) -> Tensor:
        y_THP, final_SHPN = form.ssd_scan(SSDInputs(**tensors), layout, False)
        assert final_SHPN is None
        return y_THP

    return scan


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
