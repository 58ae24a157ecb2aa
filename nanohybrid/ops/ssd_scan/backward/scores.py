"""Kernels over the [Q, Q] matrices of a chunk: the gradients of scores_ij = C_i . B_j, of B and of C.

    dscores_ij = sum over a group's heads of exp(c_i - c_j) dt_j (dy_i . x_j)            j <= i
    dC_i = sum_j dscores_ij B_j + sum_r exp(c_i) dy_ir S_r
    dB_j = sum_i dscores_ij C_i + sum_r exp(c_Q - c_j) dt_j x_jr dS_r

The sums over r run over a group's rows (head, channel), so heads of 80 need no padding. Both matrices are
stored in memory between the kernels and loaded in either orientation. So no dot reads the transpose of
another dot's result, which Triton up to 3.7.1 is reported to miscompile on Hopper. Only tiles on and below
the diagonal are written and read.

Z chunks · Q tokens of a chunk · H heads · P head dimension · G groups · N state size · R rows (head, channel)
of a group.
"""

import triton
import triton.language as tl


@triton.jit
def score_gradients(
    x, dt, c, dy, scores, dscores, by_row, by_column, table, stride_x, T, Z, H, G, P: tl.constexpr, OPERAND:
    tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """dscores [Z, G, Q, Q]; and the row and column sums of each head's dscores * scores below the diagonal.

    by_row [blocks, T, H] holds the sums over each block of columns, by_column [blocks, T, H] those over each
    block of rows. Both are sums of the same products, so terms of the decay's gradient that should cancel do
    cancel, whatever the operands were rounded to.
    """
    chunk, group = tl.program_id(0), tl.program_id(1)
    i_block, j_block = tl.program_id(2) // (CHUNK // BLOCK), tl.program_id(2) % (CHUNK // BLOCK)
    start, length = tl.load(table + chunk), tl.load(table + Z + chunk)
    if (j_block > i_block) | (i_block * BLOCK >= length):
        return
    i, j = i_block * BLOCK + tl.arange(0, BLOCK), j_block * BLOCK + tl.arange(0, BLOCK)
    i_inside, j_inside = i < length, j < length
    matrix = (chunk.to(tl.int64) * G + group) * CHUNK * CHUNK + i[:, None] * CHUNK + j[None, :]
    scores_QQ = tl.load(scores + matrix)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for head in range(group * (H // G), (group + 1) * (H // G)):
        # 1. dy_i . x_j in two widths, 64 + 16 for heads of 80
        p = tl.arange(0, FIRST)
        dy_at, x_at = (
            dy + ((start + i)[:, None] * H + head) * P,
            x + (start + j)[None, :] * stride_x + head * P,
        )
        dy_QF = tl.load(dy_at + p[None, :], mask=i_inside[:, None] & (p < P)[None, :], other=0.0)
        x_FQ = tl.load(x_at + p[:, None], mask=(p < P)[:, None] & j_inside[None, :], other=0.0)
        products = tl.dot(dy_QF.to(OPERAND), x_FQ.to(OPERAND), input_precision="ieee")
        if SECOND:
            q = FIRST + tl.arange(0, SECOND)
            dy_QS = tl.load(dy_at + q[None, :], mask=i_inside[:, None] & (q < P)[None, :], other=0.0)
            x_SQ = tl.load(x_at + q[:, None], mask=(q < P)[:, None] & j_inside[None, :], other=0.0)
            products = tl.dot(dy_QS.to(OPERAND), x_SQ.to(OPERAND), products, input_precision="ieee")
        # 2. decay; masked before exp to avoid overflow
        c_i = tl.load(c + (start + i) * H + head, mask=i_inside, other=0.0)
        c_j = tl.load(c + (start + j) * H + head, mask=j_inside, other=0.0)
        dt_j = tl.load(dt + (start + j) * H + head, mask=j_inside, other=0.0)
        causal = (i[:, None] >= j[None, :]) & i_inside[:, None]
        weighted = (
            products * dt_j[None, :] * tl.exp(tl.where(causal, c_i[:, None] - c_j[None, :], float("-inf")))
        )
        total += weighted
        # 3. the part of the decay between i and j
        strict = tl.where(i[:, None] > j[None, :], weighted * scores_QQ, 0.0)
        tl.store(by_row + (j_block.to(tl.int64) * T + start + i) * H + head, tl.sum(strict, 1), mask=i_inside)
        tl.store(
            by_column + (i_block.to(tl.int64) * T + start + j) * H + head, tl.sum(strict, 0), mask=j_inside
        )
    tl.store(dscores + matrix, total)


@triton.jit
def group_gradients(
    dscores, other, source, dt, c, states, out, table, flags, stride_other, stride_source, Z, H, G, P:
    tl.constexpr, N: tl.constexpr, OF_C: tl.constexpr, OPERAND: tl.constexpr, CHUNK: tl.constexpr, BLOCK:
    tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [T, G, N].

    With OF_C: dC from other = B, source = dy and the states that enter. Otherwise dB from C, x and the
    gradients of the states that leave. flags: which chunks have such a state.
    """
    chunk, group, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(table + chunk), tl.load(table + Z + chunk)
    if block * BLOCK >= length:
        return
    row, n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_N)
    matrix = dscores + (chunk.to(tl.int64) * G + group) * CHUNK * CHUNK
    total = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    # 1. inside the chunk: C_i with the earlier B_j, B_j with the later C_i
    begin, end = 0, (block + 1) * BLOCK
    if not OF_C:
        begin, end = block * BLOCK, length
    for first in range(begin, end, BLOCK):
        k = first + tl.arange(0, BLOCK)
        if OF_C:
            dscores_tile = tl.load(matrix + row[:, None] * CHUNK + k[None, :])
        else:
            dscores_tile = tl.load(matrix + k[None, :] * CHUNK + row[:, None])
        there = (k < length)[:, None] & (n < N)[None, :]
        other_QN = tl.load(
            other + (start + k)[:, None] * stride_other + group * N + n[None, :], mask=there, other=0.0
        )
        total = tl.dot(dscores_tile.to(OPERAND), other_QN.to(OPERAND), total, input_precision="ieee")
    # 2. through the state
    if tl.load(flags + chunk) != 0:
        rows = H // G * P
        for first_row in range(0, rows, BLOCK_R):
            r = first_row + tl.arange(0, BLOCK_R)
            head = group * (H // G) + r // P
            inside = (row < length)[:, None] & (r < rows)[None, :]
            at = (start + row)[:, None] * H + head[None, :]
            factor = tl.load(c + at, mask=inside, other=0.0)
            if not OF_C:
                factor = (
                    tl.load(c + (start + length - 1) * H + head, mask=r < rows, other=0.0)[None, :] - factor
                )
            factor = tl.exp(factor)
            if not OF_C:
                factor *= tl.load(dt + at, mask=inside, other=0.0)
            part = tl.load(
                source + (start + row)[:, None] * stride_source + group * rows + r[None, :],
                mask=inside,
                other=0.0,
            )
            state_at = (chunk.to(tl.int64) * G + group) * rows * N + r[:, None] * N + n[None, :]
            state_RN = tl.load(states + state_at, mask=(r < rows)[:, None] & (n < N)[None, :], other=0.0)
            total = tl.dot(
                (part.to(tl.float32) * factor).to(OPERAND),
                state_RN.to(OPERAND),
                total,
                input_precision="ieee",
            )
    at = ((start + row)[:, None] * G + group) * N + n[None, :]
    tl.store(out + at, total, mask=(row < length)[:, None] & (n < N)[None, :])
