"""The CPU's one-kernel forward: what plain torch computes, and the same bits however a batch is made up or a sequence is cut."""

import copy
import itertools
import weakref

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from nanohybrid.config import HybridConfig
from nanohybrid.executors.cpu.forward import _Room, compiled_forward
from nanohybrid.executors.cpu.weights import PackedLinear, pack_model, packable, prepare
from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.model.quantized import quantize_model
from nanohybrid.ops.numba import available
from nanohybrid.ops.numba import threads as team

pytestmark = pytest.mark.skipif(not available(), reason="numba is not installed")

CONTEXT = 640
SHAPE = {
    "vocab_size": 300, "hidden_size": 72, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 2, "ssm_state_size": 24,
}  # fmt: skip
CONFIGS = {
    "hybrid": HybridConfig(pattern="M-*-M", **SHAPE),
    "limits": HybridConfig(
        pattern="MM", **SHAPE | {"n_groups": 8, "time_step_limit": (0.01, 0.05), "conv_kernel": 2}
    ),
    "dense": HybridConfig(
        pattern="*-*-",
        rope_theta=1e4,
        qk_norm=True,
        mlp_activation="swiglu",
        tie_word_embeddings=True,
        **SHAPE | {"head_dim": 64},
    ),
    "wide heads": HybridConfig(
        pattern="*M", **SHAPE | {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 128}
    ),
}


def make(name, format="bf16"):
    """(a model in bf16 for torch in fp32 arithmetic, the same packed)"""
    model = HybridLM(CONFIGS[name], seed=1).bfloat16().eval()
    for key, parameter in model.named_parameters():
        if "norm" in key or key.endswith(".D"):
            parameter.data.add_(torch.randn_like(parameter) / 8)
    if format != "bf16":
        quantize_model(model, format)
    packed = copy.deepcopy(model)
    assert packable(packed)
    pack_model(packed)
    return model.float() if format == "bf16" else model, packed


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request, monkeypatch):
    """Small models are one thread's work; here they are that of two as well."""
    monkeypatch.setattr(team, "threads", lambda _: request.param)


@pytest.fixture(scope="module")
def models():
    return {name: make(name) for name in CONFIGS}


def run(model, sequences, cuts=(), slots=None, state=None):
    """Hidden states of each sequence, all in one batch, each cut into calls at these places."""
    slots = list(range(len(sequences))) if slots is None else slots
    state = state or HybridCache.for_context(model.config, max(slots) + 1, CONTEXT, model.dtype)
    found, longest = [[] for _ in sequences], max(map(len, sequences))
    places = sorted({0, *cuts, longest} - set(range(longest + 1, CONTEXT)))
    with torch.inference_mode():
        for begin, end in itertools.pairwise(places):
            here = [i for i, tokens in enumerate(sequences) if begin < len(tokens)]
            parts = [sequences[i][begin:end] for i in here]
            layout = Layout.contiguous(
                [len(part) for part in parts], [begin] * len(here), [slots[i] for i in here], CONTEXT
            )
            hidden = model.hidden(torch.cat(parts), layout, state)
            for i, rows in zip(here, hidden.split([len(part) for part in parts]), strict=True):
                found[i].append(rows)
    return [torch.cat(rows) for rows in found]


def tokens(*lengths):
    return [torch.randint(300, (length,)) for length in lengths]


def close(found, expected, tolerance=0.02):
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other.float()).abs().max() <= tolerance * other.float().abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_and_steps_after_it_are_what_torch_computes(models, name):
    plain, packed = models[name]
    sequences = tokens(140, 3, 1, 129)
    close(run(packed, sequences, cuts=(125, 126, 127, 128)), run(plain, sequences, cuts=(125, 126, 127, 128)))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_weights_are_multiplied_as_what_they_stand_for(format):
    name = "wide heads" if format == "int8" else "dense"
    plain, packed = make(name, format)
    sequences = tokens(30, 7)
    close(run(packed, sequences, cuts=(6,)), run(plain, sequences, cuts=(6,)), 0.04)


@pytest.mark.parametrize(
    ("form", "lengths"), [("bf16", [1] * 30), ("bf16", [400, 3, 1]), ("int8", [1] * 3), ("int4", [30] * 27)]
)
def test_logits_that_come_with_the_hidden_states_are_the_heads(form, lengths):
    """A few rows and more than each thread prepares for itself; of one call of the kernel and of several."""
    _, packed = make("hybrid", form)
    layout = Layout.contiguous(lengths, [0] * len(lengths), list(range(len(lengths))), CONTEXT)
    batch = torch.cat(tokens(*lengths))
    wanted = [start + length - 1 for start, length in zip(layout.starts, lengths, strict=False)]
    with torch.inference_mode():
        hidden, logits = packed.step(
            batch, layout, HybridCache.for_context(packed.config, len(lengths), CONTEXT, packed.dtype), wanted
        )
        expected = packed.hidden(
            batch, layout, HybridCache.for_context(packed.config, len(lengths), CONTEXT, packed.dtype)
        )
        assert torch.equal(hidden, expected)
        assert torch.equal(logits, packed.head(expected[wanted]))


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=12, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_bits_do_not_depend_on_batch_cuts_or_slots(models, data):
    _, packed = models[data.draw(st.sampled_from(["hybrid", "wide heads"]))]
    sequences = tokens(*data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=5)))
    alone = [run(packed, [sequence])[0] for sequence in sequences]
    cuts = sorted(data.draw(st.sets(st.integers(1, 299), max_size=4)))
    slots = data.draw(st.permutations(range(len(sequences))))
    for found, expected in zip(run(packed, sequences, cuts, slots), alone, strict=True):
        assert torch.equal(found, expected)


def test_a_batch_of_more_rows_than_a_call_holds_is_the_same(models):
    _, packed = models["hybrid"]
    sequences = tokens(500, 450)
    for found, one in zip(run(packed, sequences), sequences, strict=True):
        assert torch.equal(found, run(packed, [one], cuts=(77,))[0])


@pytest.mark.parametrize("width", [1, 3, 9, 20, 30])
def test_every_height_of_tile_gives_the_same_bits(models, width):
    _, packed = models["dense"]
    sequences = tokens(*[5] * width)
    for found, one in zip(run(packed, sequences, cuts=(4,)), sequences, strict=True):
        assert torch.equal(found, run(packed, [one])[0])


def test_what_is_no_number_stays_with_its_sequence(models):
    _, packed = models["hybrid"]
    broken = copy.deepcopy(packed)
    broken.backbone.embeddings.weight.data[7] = float("nan")
    good, bad = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 7, 3, 4])
    state = HybridCache.for_context(packed.config, 2, CONTEXT, torch.bfloat16)
    found = run(broken, [good, bad], cuts=(3,), state=state)
    assert torch.equal(found[0], run(packed, [good])[0])
    assert found[1][1:].isnan().all()
    # the slot and the pages of the broken one, given to the next: a new sequence begins from zeros
    assert torch.equal(run(broken, [good], slots=[1], state=state)[0], found[0])


def test_tokens_that_were_taken_back_leave_no_trace(models):
    _, packed = models["hybrid"]
    history, drafted, other, after = tokens(20, 6, 9, 4)
    state = HybridCache.for_context(packed.config, 2, CONTEXT, torch.bfloat16)
    run(packed, [history, other], state=state)
    for stay in (0, 4, 6):
        begun = HybridCache.for_context(packed.config, 2, CONTEXT, torch.bfloat16)
        for mine, theirs in zip(
            begun.slot_pools + begun.page_pools, state.slot_pools + state.page_pools, strict=True
        ):
            mine.copy_(theirs)
        layout = Layout.with_cache([6, 1], [20, 9], [0, 1], [range(5), range(5, 10)], speculative=[0])
        with torch.inference_mode():
            hidden = packed.hidden(torch.cat([drafted, after[:1]]), layout, begun)
            begun.settle([0] if stay else [], [stay] if stay else [])
            next_layout = Layout.with_cache([4], [20 + stay], [0], [range(5)])
            found = packed.hidden(after, next_layout, begun)
        whole = run(packed, [torch.cat([history, drafted[:stay], after])])[0]
        assert torch.equal(found, whole[20 + stay :])
        assert torch.equal(hidden[:6], run(packed, [torch.cat([history, drafted])])[0][20:])


def test_each_thread_has_scratch_of_its_own_however_many_there_were_before(models, monkeypatch):
    _, packed = models["hybrid"]
    state = HybridCache.for_context(packed.config, 1, CONTEXT, torch.bfloat16)
    for count in (1, 3):
        monkeypatch.setattr(team, "threads", lambda _, count=count: count)
        run(packed, tokens(5), state=state)
        assert len(compiled_forward(packed, state)._room(5, count).tensors[-1]) == count


def test_a_window_of_more_rows_than_a_call_holds_stays_within_its_scratch(models, monkeypatch):
    _, packed = models["hybrid"]
    make, guards = _Room.make, []

    def guarded(*sizes):
        *others, shared, own = make(*sizes).tensors
        guards.append(torch.full((1000, shared.shape[1]), 7, dtype=torch.bfloat16))
        both = torch.cat([shared, guards[-1]])
        guards[-1] = both[len(shared) :]
        return _Room((*others, both, own))

    monkeypatch.setattr(_Room, "make", guarded)
    count = 50
    state = HybridCache.for_context(packed.config, count, CONTEXT, torch.bfloat16)
    pages = [range(state.pages // count * i, state.pages // count * (i + 1)) for i in range(count)]
    layout = Layout.with_cache([10] * count, [0] * count, range(count), pages, speculative=range(count))
    with torch.inference_mode():
        packed.hidden(torch.cat(tokens(*[10] * count)), layout, state)
        state.settle(list(range(count)), [10] * count)
    assert guards and all((guard == 7).all() for guard in guards)


def test_without_a_state_the_layers_run_on_the_same_panels(models):
    plain, packed = models["hybrid"]
    rows = torch.randint(300, (2, 9))
    with torch.inference_mode():
        close([packed(rows)], [plain(rows)])


def test_models_that_the_kernels_cannot_hold_are_left_alone(monkeypatch):
    assert not prepare(HybridLM(CONFIGS["hybrid"], seed=0))  # fp32
    narrow = HybridLM(HybridConfig(pattern="*", **SHAPE | {"head_dim": 8}), seed=0).bfloat16()
    assert not prepare(narrow)
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")
    model = HybridLM(CONFIGS["hybrid"], seed=0).bfloat16()
    assert not prepare(model)
    monkeypatch.setenv("NANOHYBRID_KERNELS", "numba")
    assert prepare(model) and isinstance(model.lm_head, PackedLinear)


def test_a_state_of_other_types_is_left_to_torch(models):
    _, packed = models["hybrid"]
    assert compiled_forward(packed, HybridCache.for_context(packed.config, 1, CONTEXT, torch.float32)) is None


def test_packing_keeps_no_weight_that_is_packed(monkeypatch):
    """A list of the linears to pack held all of them to the end: the 9B in int4 took twice its weights."""
    model = HybridLM(CONFIGS["hybrid"], seed=1).bfloat16().eval()
    of, seen = PackedLinear.of, []

    def watched(linear):
        assert not [one for one in seen if one() is not None]
        seen.append(weakref.ref(linear))
        return of(linear)

    monkeypatch.setattr(PackedLinear, "of", watched)
    pack_model(model)
    assert len(seen) > 5
