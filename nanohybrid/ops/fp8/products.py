"""Selects the block-scaled product: torch's where it agrees with our kernel and is faster, else ours.

The choice is measured at the first product of its kind and then reused. A kind is the recipe, the shape (rows
rounded to the next power of two, since ragged batches differ) and the result's dtype. A warning gives the
reason where torch's product fails, since that may be our mistake.
"""

import warnings
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from nanohybrid.ops.fp8.product_kernel import product as our_product
from nanohybrid.ops.fp8.quantize_kernels import Operand

Product = Callable[[Operand, Operand, torch.dtype], Tensor]
ROUNDS = 5
MAX_DIFFERENCE = 0.01  # relative, in the norm; bf16 results differ by 0.002, those of a wrong scale by 1

chosen: dict[tuple[object, ...], Product] = {}


def product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a b^T in `dtype`; a in tiles, b in tiles or in blocks."""
    if not a.q.is_cuda:
        return our_product(a, b, dtype)
    kind = (a.q.device, a.q.shape[0].bit_length(), b.q.shape, b.scales.shape, dtype)
    if kind not in chosen:
        chosen[kind] = fastest(a, b, dtype)
    return chosen[kind](a, b, dtype)


def fastest(a: Operand, b: Operand, dtype: torch.dtype) -> Product:
    """torch's product if it runs, agrees with ours and takes less time; else ours."""
    expected = our_product(a, b, dtype).double()
    try:
        found = torch_product(a, b, dtype).double()
    # torch has no block scales, or not for this shape, dtype or GPU.
    except (RuntimeError, ValueError, TypeError, AttributeError) as refusal:
        reason = str(refusal).partition("\n")[0]
        warnings.warn(f"torch's block-scaled product fails, so our own is used: {reason}", stacklevel=2)
        return our_product
    if not (found - expected).norm() <= MAX_DIFFERENCE * expected.norm():
        return our_product
    return (
        torch_product
        if milliseconds(torch_product, a, b, dtype) < milliseconds(our_product, a, b, dtype)
        else our_product
    )


def torch_product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a b^T by torch.

    For tiles it needs scales with contiguous rows, for blocks rows of scales padded to a multiple of four.
    """
    tiles, blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    if b.scales.shape[0] == b.q.shape[0]:
        recipe, scale_b = tiles, b.scales.t().contiguous()
    else:
        recipe, scale_b = blocks, F.pad(b.scales, (0, -b.scales.shape[1] % 4))[:, : b.scales.shape[1]].t()
    scale_a = a.scales.t().contiguous().t()
    out: Tensor = F.scaled_mm(a.q, b.q.t(), scale_a, tiles, scale_b, recipe, output_dtype=dtype)
    return out


def milliseconds(run: Product, a: Operand, b: Operand, dtype: torch.dtype) -> float:
    """Median time of a few runs by CUDA events."""
    run(a, b, dtype)
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run(a, b, dtype)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)
