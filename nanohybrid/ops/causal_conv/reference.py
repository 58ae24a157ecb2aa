"""y_t = bias + sum_{k=0}^{W-1} weight[:, W-1-k] x_{t-k}; x before a sequence is its initial state or 0.

T tokens · S sequences · C channels · W window.
"""

import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout


def causal_conv(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    layout: Layout,
    initial_SWC: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y_TC and the last W - 1 inputs of each sequence (None unless `output_final_state`)."""
    W = weight_CW.shape[1]
    dtype = torch.promote_types(x_TC.dtype, torch.float32)
    ys, finals = [], []
    for sequence in range(layout.sequences):
        before_WC = (
            x_TC.new_zeros(W - 1, x_TC.shape[1])
            if initial_SWC is None
            else initial_SWC[sequence].to(x_TC.dtype)
        )
        inputs = torch.cat([before_WC, x_TC[layout.starts[sequence] : layout.starts[sequence + 1]]])
        for t in range(W - 1, len(inputs)):
            ys.append(
                bias_C.to(dtype)
                + torch.einsum("WC,CW->C", inputs[t - W + 1 : t + 1].to(dtype), weight_CW.to(dtype))
            )
        finals.append(inputs[len(inputs) - (W - 1) :])
    return torch.stack(ys), torch.stack(finals) if output_final_state else None
