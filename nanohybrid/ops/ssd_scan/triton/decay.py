"""The running log-decay inside each chunk."""

import triton
import triton.language as tl


@triton.jit
def chunk_cumsum(dt, A, c, starts_Z, lengths_Z, H, Q: tl.constexpr, HEADS: tl.constexpr):
    """c_TH: the sum of dt A from a chunk's first token to each token."""
    chunk = tl.program_id(0)
    t, h = tl.arange(0, Q), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (t < tl.load(lengths_Z + chunk))[:, None] & (h < H)[None, :]
    at = (tl.load(starts_Z + chunk) + t)[:, None] * H + h[None, :]
    log_decay = tl.load(dt + at, mask=inside, other=0) * tl.load(A + h, mask=h < H, other=0)[None, :]
    tl.store(c + at, tl.cumsum(log_decay, 0), mask=inside)
