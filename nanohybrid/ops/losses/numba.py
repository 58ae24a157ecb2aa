"""The numba form of the cross-entropy of a chunk of logits. It allocates nothing of the size of a chunk.

Q tokens of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from nanohybrid.ops.numba import pointwise
from nanohybrid.ops.numba.threads import num_threads, run


def cross_entropy(logits_QV: Tensor, targets_Q: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of each token in fp32; with_gradient: and the gradient, in the logits' memory and dtype."""
    if logits_QV.dtype not in (torch.float32, torch.bfloat16):
        from nanohybrid.ops.losses.cross_entropy import chunk_loss

        return chunk_loss(logits_QV, targets_Q, with_gradient)
    logits_QV, targets_Q = logits_QV.contiguous(), targets_Q.contiguous()
    loss_Q = torch.empty(len(logits_QV), dtype=torch.float32)
    addresses = logits_QV.stride(0), logits_QV.data_ptr(), targets_Q.data_ptr(), loss_Q.data_ptr()
    run(
        pointwise.cross_entropy_rows,
        *logits_QV.shape,
        *addresses,
        with_gradient,
        logits_QV.dtype == torch.bfloat16,
        size=num_threads(2 * logits_QV.nbytes),
    )
    return loss_Q, logits_QV if with_gradient else None
