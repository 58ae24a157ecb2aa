"""Which block-scaled product runs: our kernel, or torch's where this torch and GPU have one that agrees with it and is faster.

Settled by measurement at the first product of its kind, and remembered: the recipe, the shape (rows to the next power of two,
since ragged batches differ) and the result's dtype make a kind. What torch refuses to do, or does otherwise, is passed over; of a refusal
a warning tells the reason, since it may be a mistake of ours.
"""

import warnings
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from nanohybrid.ops.fp8.product_kernel import product as own
from nanohybrid.ops.fp8.quantize_kernels import Operand

Product = Callable[[Operand, Operand, torch.dtype], Tensor]
ROUNDS = 5
AGREE = 0.01  # relative, in the norm: bf16 results differ by 0.002, a wrong scale by 1

chosen: dict[tuple[object, ...], Product] = {}


def product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a b^T in `dtype`; a in tiles, b in tiles or in blocks."""
    if not a.q.is_cuda:
        return own(a, b, dtype)
    kind = (a.q.device, a.q.shape[0].bit_length(), b.q.shape, b.scales.shape, dtype)
    if kind not in chosen:
        chosen[kind] = fastest(a, b, dtype)
    return chosen[kind](a, b, dtype)


def fastest(a: Operand, b: Operand, dtype: torch.dtype) -> Product:
    """Torch's product if it runs, agrees with ours and takes less time; else ours."""
    expected = own(a, b, dtype).double()
    try:
        found = torchs(a, b, dtype).double()
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
    ) as refusal:  # without block scales, or not for this shape, dtype or GPU
        reason = str(refusal).partition("\n")[0]
        warnings.warn(f"torch's block-scaled product is passed over for our own: {reason}", stacklevel=2)
        return own
    if not (found - expected).norm() <= AGREE * expected.norm():
        return own
    return torchs if milliseconds(torchs, a, b, dtype) < milliseconds(own, a, b, dtype) else own


def torchs(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a b^T by torch: tiles want scales with the rows contiguous, blocks want rows of scales padded to four."""
    tiles, blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    if b.scales.shape[0] == b.q.shape[0]:
        recipe, scale_b = tiles, b.scales.t().contiguous()
    else:
        recipe, scale_b = blocks, F.pad(b.scales, (0, -b.scales.shape[1] % 4))[:, : b.scales.shape[1]].t()
    scale_a = a.scales.t().contiguous().t()
    out: Tensor = F.scaled_mm(a.q, b.q.t(), scale_a, tiles, scale_b, recipe, output_dtype=dtype)
    return out


def milliseconds(run: Product, a: Operand, b: Operand, dtype: torch.dtype) -> float:
    """Median of a few runs by CUDA events."""
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
