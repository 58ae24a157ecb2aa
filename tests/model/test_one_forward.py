"""Training, prefill, chunked prefill and decode are one forward: however the work is cut, the results are the
same.
"""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridCache, HybridLM, Layout

CONTEXT = 320
CLOSE = dict(atol=1e-9, rtol=1e-9)


def state_for(model: HybridLM, slots: int, page_size: int = 32) -> HybridCache:
    return HybridCache.allocate(
        model.config, slots, slots * CONTEXT // page_size, page_size, dtype=torch.float64
    )


def stored(lengths: list[int], positions: list[int], slots: list[int], page_size: int = 32) -> Layout:
    return Layout.contiguous(lengths, positions, slots, CONTEXT, page_size)


def feed(model: HybridLM, tokens: Tensor, cuts: list[int], state: HybridCache, slot: int = 0) -> Tensor:
    """The logits of `tokens`, given piece by piece."""
    pieces = []
    with torch.no_grad():
        for begin, end in itertools.pairwise(cuts):
            pieces.append(model(tokens[begin:end], stored([end - begin], [begin], [slot]), state))
    return torch.cat(pieces)


def whole(model: HybridLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, Layout.packed([len(tokens)]))


def gradients(model: HybridLM) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_packed_documents_are_the_documents_alone_and_so_are_their_gradients(model, tokens):
    lengths = [1, 130, 2, 17, 63]
    parts = tokens[: sum(lengths)].split(lengths)
    alone = [model(part, Layout.packed([len(part)])) for part in parts]
    torch.cat(alone).log_softmax(-1)[:, 3].sum().backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    packed = model(torch.cat(parts), Layout.packed(lengths))
    packed.log_softmax(-1)[:, 3].sum().backward()
    torch.testing.assert_close(packed, torch.cat(alone), **CLOSE)
    found = gradients(model)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **CLOSE, msg=name)


def test_a_rectangular_batch_is_its_rows(model, tokens):
    batch = tokens[:60].view(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[1], whole(model, batch[1]), **CLOSE)
    with pytest.raises(ValueError, match=r"must be \[batch, length\]"):
        model(tokens)


def test_a_prompt_in_chunks_is_the_prompt_whole(model, tokens):
    expected = whole(model, tokens)
    chooser = random.Random(0)
    for _ in range(3):
        cuts = [0, *sorted(chooser.sample(range(1, len(tokens)), 4)), len(tokens)]
        torch.testing.assert_close(feed(model, tokens, cuts, state_for(model, 1)), expected, **CLOSE)


def test_one_token_at_a_time_is_the_prompt_whole(model, tokens):
    tokens = tokens[:140]
    torch.testing.assert_close(
        feed(model, tokens, list(range(len(tokens) + 1)), state_for(model, 1)), whole(model, tokens), **CLOSE
    )


@pytest.mark.parametrize("slots", [[0, 1, 2], [4, 0, 2]], ids=["slots in a run", "slots scattered"])
def test_a_sequence_in_a_batch_is_the_sequence_alone(model, tokens, slots):
    """Prefill, continuation and decode mixed in one call, three calls long."""
    texts = tokens[:90].view(3, 30)
    state = state_for(model, 5)
    schedule = [
        ([20, 0, 0], [0, 0, 0]),
        ([1, 10, 0], [20, 0, 0]),
        ([1, 5, 7], [21, 10, 0]),
        ([1, 1, 1], [22, 15, 7]),
    ]
    logits: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for lengths, positions in schedule:
            rows = [i for i in range(3) if lengths[i]]
            layout = stored(
                [lengths[i] for i in rows], [positions[i] for i in rows], [slots[i] for i in rows]
            )
            out = model(
                torch.cat([texts[i, positions[i] : positions[i] + lengths[i]] for i in rows]), layout, state
            )
            for i, part in zip(rows, out.split([lengths[i] for i in rows]), strict=True):
                logits[i].append(part)
    for text, parts in zip(texts, logits, strict=True):
        together = torch.cat(parts)
        torch.testing.assert_close(together, whole(model, text[: len(together)]), **CLOSE)


def test_a_slot_is_used_again_without_clearing(model, tokens):
    state = state_for(model, 1)
    feed(model, tokens[:100], [0, 70, 100], state)
    for cuts in ([0, 40], [0, 1, 2, 40]):
        torch.testing.assert_close(
            feed(model, tokens[100:140], cuts, state), whole(model, tokens[100:140]), **CLOSE
        )


def test_a_slot_that_holds_nan_is_used_again_without_clearing(mixed, tokens):
    """Only what a sequence reads before it writes: conv and SSM; pages are written first."""
    model = HybridLM(mixed, seed=0).double()
    state = state_for(model, 2)
    for layer in state.layers:
        for name in layer.keys() & {"conv", "ssm"}:
            layer[name].fill_(float("nan"))
    for slot, cuts in ((0, [0, 40]), (1, [0, 1, 40])):
        torch.testing.assert_close(
            feed(model, tokens[:40], cuts, state, slot), whole(model, tokens[:40]), **CLOSE
        )


def test_what_is_stored_keeps_no_graph_alive(mixed, tokens):
    model = HybridLM(mixed, seed=0).double()
    state = state_for(model, 1)
    for begin, end in ((0, 20), (20, 21), (21, 30)):
        hidden = model.hidden(tokens[begin:end], stored([end - begin], [begin], [0]), state)
        assert not hidden.requires_grad
    assert not any(pool.requires_grad for layer in state.layers for pool in layer.values())


def test_other_slots_and_pages_are_left_as_they_were(mixed, tokens):
    model = HybridLM(mixed, seed=0).double()
    state = state_for(model, 3)
    feed(model, tokens[:50], [0, 50], state, slot=1)
    before = [{name: pool.clone() for name, pool in layer.items()} for layer in state.layers]
    feed(model, tokens[50:80], [0, 20, 21, 30], state, slot=2)
    pages = CONTEXT // 32
    for layer, old in zip(state.layers, before, strict=True):
        for name, pool in layer.items():
            mine = slice(0, 2) if name in ("conv", "ssm") else slice(0, 2 * pages)
            assert torch.equal(pool[mine], old[name][mine]), name


@given(st.lists(st.integers(1, 139), max_size=5, unique=True))
def test_any_cuts_give_the_same_logits(cuts):
    config = HybridConfig(
        pattern="M*M", vocab_size=50, hidden_size=16, intermediate_size=8, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
        mamba_num_heads=2, mamba_head_dim=6, n_groups=1, ssm_state_size=4, initializer_range=0.2,
    )  # fmt: skip
    model = HybridLM(config, seed=0).double()
    tokens = torch.arange(140) * 7 % 50
    found = feed(model, tokens, [0, *sorted(cuts), 140], state_for(model, 1))
    torch.testing.assert_close(found, whole(model, tokens), **CLOSE)


def test_a_document_never_sees_the_one_before_it(mixed, tokens):
    """Even where that one is NaN throughout: outputs and gradients are bitwise the same."""
    model = HybridLM(mixed, seed=0)

    def run(first: float) -> tuple[Tensor, Tensor]:
        embedded = torch.randn(60, mixed.hidden_size, generator=torch.Generator().manual_seed(3))
        embedded[:33] = embedded[:33] * first
        leaf = embedded.requires_grad_()
        hidden, layout = leaf, Layout.packed([33, 27])
        for block in model.backbone.layers:
            hidden = block(hidden, layout, None)
        hidden[33:].sum().backward()
        return hidden[33:], leaf.grad[33:]

    for clean, dirty in zip(run(1.0), run(float("nan")), strict=True):
        assert clean.isfinite().all() and torch.equal(clean, dirty)


def test_narrow_types_keep_their_dtype_and_agree(config, tokens):
    model = HybridLM(config, seed=0).bfloat16()
    state = HybridCache.for_context(config, 1, CONTEXT, torch.bfloat16)
    layout = Layout.contiguous([70], [0], [0], CONTEXT)
    with torch.no_grad():
        assert model.hidden(tokens[:70], layout, state).dtype == torch.bfloat16
        expected = model(tokens[:80], Layout.packed([80]))
        last = model(tokens[70:80], Layout.contiguous([10], [70], [0], CONTEXT), state)
    assert expected.dtype == last.dtype == torch.float32
    assert (last - expected[70:]).abs().max() < 0.05 * expected.abs().max()
