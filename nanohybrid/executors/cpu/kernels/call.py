"""The words of a kernel call and of its tables, named once for Python, which writes them, and for the
kernels, which read them.

Each struct is a NamedTuple of int64 words. Python builds it by name, so a missing, unknown or misspelled word
is an error. Kernels index the words by the tuple of positions beside it (`CALL.tokens`), which numba folds
into constants. An address is that of memory which lives as long as the call.

T tokens · E hidden size · V vocabulary · S sequences · W rows whose logits are wanted · H heads · P head
dimension · N state size · C conv channels · K conv kernel size.
"""

from __future__ import annotations

from typing import NamedTuple

KERNELS = ("mamba2", "attention", "gated_mlp", "mlp")
"""Names of layer kernels (CpuKernel.name); a layer's word `kernel` is the index here."""


class Layer(NamedTuple):
    """The first words of a row of the table of layers; MEMORY words of addresses follow.

    The last row is the final norm.
    """

    kernel: int  # index in KERNELS
    norm: int  # address of the norm's weight, fp32 [E]
    first_linear: int  # index in the table of linears


class MambaMemory(NamedTuple):
    """The addresses that a Mamba-2 layer reads; vectors are fp32."""

    conv: int  # bfloat16 [slots, K - 1, C]
    ssm: int  # fp32 [slots, H, P, N]
    conv_weight: int  # [K, C]
    conv_bias: int  # [C]
    dt_bias: int  # [H]
    A: int  # negative, [H]
    D: int  # [H]
    norm: int  # [H * P]


class AttentionMemory(NamedTuple):
    """The addresses that an attention layer reads."""

    key: int  # bfloat16 pages, in the order of kv_cache.py
    value: int
    q_norm: int  # fp32 [P], or 0
    k_norm: int  # fp32 [P], or 0


class MambaSizes(NamedTuple):
    """Sizes of all Mamba-2 layers; zeros where there is none."""

    heads: int
    head_dim: int
    groups: int
    state_size: int
    conv_kernel: int


class AttentionSizes(NamedTuple):
    """Sizes of all attention layers; zeros where there is none."""

    heads: int
    kv_heads: int
    head_dim: int


class Call(NamedTuple):
    """One call: the model, scratch memory, the batch, and the outputs.

    Addresses unless said otherwise; 0 where there is nothing.
    """

    # the model, the same in every call
    layers: int  # Layer rows
    layer_count: int  # their number
    linears: int  # rows of gemm.LINEAR
    linear_count: int  # their number
    mamba: int  # MambaSizes
    attention: int  # AttentionSizes
    limits: int  # fp32: lower and upper limit of dt, eps of the norms
    embeddings: int  # bfloat16 [V, E]
    head: int  # the head's row of gemm.LINEAR; 0 where the head is tied
    # scratch memory
    residual: int  # fp32 [T, E]
    projected: int  # fp32 [T, widest projection]
    normed: int  # packed rows: the input of a layer's first linear
    quantized: int  # rows quantized to integers
    mixed: int  # packed rows, to which all threads write: the input of a layer's last linear
    private: int  # scratch of the first thread
    private_bytes: int  # bytes of each thread's scratch, one after another
    # the batch
    tokens: int  # int64 ids [T]
    rows: int  # T
    sequences: int  # S
    starts: int  # int64 [S + 1]: first row of each sequence
    slots: int  # int64 [S]
    positions: int  # int64 [S]: position of each sequence's first row
    pages: int  # int64 [S, pages_per_sequence]
    pages_per_sequence: int  # a number
    angles: int  # fp32 [T, P]: rotary cos and sin
    # the outputs
    draft_inputs: int  # fp32 [Mamba-2 layers, draft_count, columns]: saved projections of draft tokens
    draft_rows: int  # int64 [T]: each row's index in draft_inputs, -1 for none
    draft_count: int  # a number
    out: int  # bfloat16 [T, E]: final hidden states
    logits: int  # fp32 [W, V]
    wanted_rows: (
        int  # int64 [W]: rows whose logits are wanted; in `advance`, tokens to accept of each sequence
    )
    wanted_count: int  # W
    profile: int  # counters of profiler.py


CALL = Call(*range(len(Call._fields)))
LAYER = Layer(*range(len(Layer._fields)))
MAMBA = MambaSizes(*range(len(MambaSizes._fields)))
MAMBA_MEMORY = MambaMemory(*range(len(MambaMemory._fields)))
ATTENTION = AttentionSizes(*range(len(AttentionSizes._fields)))
ATTENTION_MEMORY = AttentionMemory(*range(len(AttentionMemory._fields)))
MEMORY_WORDS = len(
    MambaMemory._fields
)  # address words of a row of the table of layers, enough for every kernel
MEMORY = len(Layer._fields)  # where they begin
LAYER_WORDS = MEMORY + MEMORY_WORDS  # words of a row
