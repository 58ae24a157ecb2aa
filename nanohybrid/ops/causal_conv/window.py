"""The causal convolution for one token of each sequence: its state and the new input are the window."""

import torch
from torch import Tensor


def causal_conv(
    x_SC: Tensor, weight_CW: Tensor, bias_C: Tensor, initial_SWC: Tensor
) -> tuple[Tensor, Tensor]:
    """y_SC in fp32 (float64 for float64), and the inputs that the next call needs."""
    window_SWC = torch.cat([initial_SWC.to(x_SC.dtype), x_SC[:, None]], dim=1)
    dtype = torch.promote_types(x_SC.dtype, torch.float32)
    return torch.einsum("SWC,CW->SC", window_SWC.to(dtype), weight_CW.to(dtype)) + bias_C.to(
        dtype
    ), window_SWC[:, 1:]
