"""The decode step of Mamba-2 in place on the cache, from in_proj's output to the gated norm's input."""

from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.layout import Layout

TRITON = Kernel("nanohybrid.ops.mamba_step.triton:mamba_step")


def mamba_step(
    xBC_SC: Tensor, dt_SH: Tensor, conv_weight_CW: Tensor, conv_bias_C: Tensor, dt_bias_H: Tensor, A_log_H:
    Tensor, D_H: Tensor, conv_pool: Tensor, ssm_pool: Tensor, layout: Layout, groups: int, limit: tuple[float,
    float],
) -> Tensor | None:  # fmt: skip
    """y [S, H, P] in fp32 for one token of each sequence, with both states advanced in place; or None.

    xBC and dt: as in_proj gives them. conv_pool [slots, W - 1, C]; ssm_pool [slots, H, P, N] in fp32 or fp16.
    limit: of dt. Only Triton has this form. None means that nothing was computed: the mixer then runs
    causal_conv and ssd_step on copies of the states' rows.
    """
    step = choose(xBC_SC, dt_SH, A_log_H, ssm_pool, reference=_composed, torch=_composed, triton=TRITON)
    y_SHP: Tensor | None = step(
        xBC_SC,
        dt_SH,
        conv_weight_CW,
        conv_bias_C,
        dt_bias_H,
        A_log_H,
        D_H,
        conv_pool,
        ssm_pool,
        layout,
        groups,
        limit,
    )
    return y_SHP


def _composed(*arguments: object) -> None:
    return None
