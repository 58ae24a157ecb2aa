"""The scan as an autograd function, for forms with a hand-written gradient.

It saves the inputs; states are recomputed.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan.inputs import SSDInputs

Forward = Callable[[SSDInputs, Layout, bool], tuple[Tensor, Tensor | None]]
Backward = Callable[[Tensor, Tensor | None, SSDInputs, Layout], SSDInputs]


class Scan(Function):
    """Arguments: layout, output_final_state, the form's forward and backward, then the tensors of SSDInputs.

    `backward` gets the gradient of y, that of the final states (None where they are not used), the inputs and
    the layout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        output_final_state: bool,
        forward: Forward,
        backward: Backward,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = SSDInputs(*tensors)  # type: ignore[arg-type]
        ctx.save_for_backward(*inputs)
        ctx.layout, ctx.form_backward = layout, backward
        ctx.set_materialize_grads(False)  # final states that are not used have no gradient
        return forward(inputs, layout, output_final_state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THP: Tensor | None, dfinal_SHPN: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = SSDInputs(*ctx.saved_tensors)
        if dy_THP is None:
            dy_THP = inputs.dt_TH.new_zeros(inputs.x_THP.shape)  # y has the dtype of dt
        return None, None, None, None, *ctx.form_backward(dy_THP, dfinal_SHPN, inputs, ctx.layout)
