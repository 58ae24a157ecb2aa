"""The gate and the group RMSNorm of Mamba-2, in that order."""

from torch import Tensor

from nanohybrid.ops.dispatch import choose
from nanohybrid.ops.gated_norm import fused, reference


def gated_norm(y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """RMSNorm within each of `groups` groups of channels of y silu(z), times weight; fp32 sums, cast once to z's dtype."""
    return choose(y_TD, z_TD, weight_D, reference=reference.gated_norm, torch=fused.gated_norm)(y_TD, z_TD, weight_D, groups, eps)
