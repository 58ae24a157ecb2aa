"""The CPU executor: the plain model's numbers, and the same bits in any batch and for any cut of a sequence
into calls.
"""

import copy
import dataclasses
import itertools
import weakref

import hypothesis
import pytest
import torch
from configurations import BASE
from configurations import CONFIGS as MODELS
from hypothesis import strategies as st

from nanohybrid.config import HybridConfig
from nanohybrid.executors import TorchExecutor, executor_for
from nanohybrid.executors.cpu.forward import CpuExecutor, _Scratch
from nanohybrid.executors.cpu.weights import PackedLinear, pack_model, packable, prepare
from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.model.quantized import quantize_model
from nanohybrid.ops.numba import available, threads

pytestmark = pytest.mark.skipif(not available(), reason="numba is not installed")

CONTEXT = 640
SHAPE = {
    "vocab_size": 300, "hidden_size": 72, "intermediate_size": 96, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16,
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


# of the table of the model's tests: the kernels need heads of a multiple of 16
CONFIGS |= {
    f"table: {name}": HybridConfig(**BASE | fields | {"head_dim": 16}) for name, fields in MODELS.items()
}


def make(name, format="bf16"):
    """A model with the weights of bf16 in fp32 (quantized: in bf16) for the plain forward, and the same
    packed in bf16.
    """
    model = HybridLM(CONFIGS[name], seed=1).bfloat16().eval()
    generator = torch.Generator().manual_seed(1)  # the fixture of all models runs before a test is seeded
    for key, parameter in model.named_parameters():
        if "norm" in key or key.endswith(".D"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise.to(parameter.dtype) / 8)
    if format != "bf16":
        quantize_model(model, format)
    packed = copy.deepcopy(model)
    assert packable(packed)
    pack_model(packed)
    return model.float() if format == "bf16" else model, packed


@pytest.fixture(autouse=True, params=[1, 2])
def num_threads(request, monkeypatch):
    """Small models are one thread's work; here they are that of two as well."""
    monkeypatch.setattr(threads, "num_threads", lambda _: request.param)


@pytest.fixture(scope="module")
def models():
    return {name: make(name) for name in CONFIGS}


def opened(model, slots):
    """The executor for a model over an empty cache."""
    return executor_for(model, HybridCache.for_context(model.config, slots, CONTEXT, model.dtype))


def run(model, sequences, cuts=(), slots=None, executor=None):
    """Hidden states of each sequence, all in one batch, each cut into calls at these places."""
    slots = list(range(len(sequences))) if slots is None else slots
    executor = executor or opened(model, max(slots) + 1)
    found, longest = [[] for _ in sequences], max(map(len, sequences))
    places = sorted({0, *cuts, longest} - set(range(longest + 1, CONTEXT)))
    with torch.inference_mode():
        for begin, end in itertools.pairwise(places):
            here = [i for i, tokens in enumerate(sequences) if begin < len(tokens)]
            parts = [sequences[i][begin:end] for i in here]
            layout = Layout.contiguous(
                [len(part) for part in parts], [begin] * len(here), [slots[i] for i in here], CONTEXT
            )
            hidden, _ = executor.run(torch.cat(parts), layout, ())
            for i, rows in zip(here, hidden.split([len(part) for part in parts]), strict=True):
                found[i].append(rows)
    return [torch.cat(rows) for rows in found]


def tokens(*lengths):
    return [torch.randint(50, (length,)) for length in lengths]


def close(found, expected, tolerance=0.02):
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other.float()).abs().max() <= tolerance * other.float().abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_cpu_executor_equals_the_torch_executor_for_prompts_and_steps(models, name):
    plain, packed = models[name]
    assert isinstance(opened(packed, 1), CpuExecutor) and isinstance(opened(plain, 1), TorchExecutor)
    sequences = tokens(140, 3, 1, 129)
    close(run(packed, sequences, cuts=(125, 126, 127, 128)), run(plain, sequences, cuts=(125, 126, 127, 128)))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_cpu_executor_multiplies_quantized_weights_as_torch_does(format):
    name = "wide heads" if format == "int8" else "dense"
    plain, packed = make(name, format)
    sequences = tokens(30, 7)
    close(run(packed, sequences, cuts=(6,)), run(plain, sequences, cuts=(6,)), 0.04)


@pytest.mark.parametrize(
    ("form", "lengths"), [("bf16", [1] * 30), ("bf16", [400, 3, 1]), ("int8", [1] * 3), ("int4", [30] * 27)]
)
def test_cpu_executor_logits_equal_the_head_of_its_hidden_states(form, lengths):
    """A few rows and more than each thread prepares for itself; of one call of the kernel and of several."""
    _, packed = make("hybrid", form)
    layout = Layout.contiguous(lengths, [0] * len(lengths), list(range(len(lengths))), CONTEXT)
    batch = torch.cat(tokens(*lengths))
    wanted = [start + length - 1 for start, length in zip(layout.starts, lengths, strict=False)]
    with torch.inference_mode():
        hidden, logits = opened(packed, len(lengths)).run(batch, layout, wanted)
        expected, _ = opened(packed, len(lengths)).run(batch, layout, ())
        assert torch.equal(hidden, expected)
        assert torch.equal(logits, packed.head(expected[wanted]))


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=12, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_cpu_executor_bits_do_not_depend_on_batch_cuts_or_slots(models, data):
    _, packed = models[data.draw(st.sampled_from(["hybrid", "wide heads"]))]
    sequences = tokens(*data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=5)))
    alone = [run(packed, [sequence])[0] for sequence in sequences]
    cuts = sorted(data.draw(st.sets(st.integers(1, 299), max_size=4)))
    slots = data.draw(st.permutations(range(len(sequences))))
    for found, expected in zip(run(packed, sequences, cuts, slots), alone, strict=True):
        assert torch.equal(found, expected)


def test_cpu_executor_splits_long_batches_without_changing_bits(models):
    _, packed = models["hybrid"]
    sequences = tokens(500, 450)
    for found, one in zip(run(packed, sequences), sequences, strict=True):
        assert torch.equal(found, run(packed, [one], cuts=(77,))[0])


@pytest.mark.parametrize("width", [1, 3, 9, 20, 30])
def test_cpu_executor_bits_are_the_same_for_every_tile_height(models, width):
    _, packed = models["dense"]
    sequences = tokens(*[5] * width)
    for found, one in zip(run(packed, sequences, cuts=(4,)), sequences, strict=True):
        assert torch.equal(found, run(packed, [one])[0])


def test_cpu_executor_keeps_nan_inside_its_sequence(models):
    _, packed = models["hybrid"]
    broken = copy.deepcopy(packed)
    broken.backbone.embeddings.weight.data[7] = float("nan")
    good, bad = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 7, 3, 4])
    executor = opened(broken, 2)
    found = run(broken, [good, bad], cuts=(3,), executor=executor)
    assert torch.equal(found[0], run(packed, [good])[0])
    assert found[1][1:].isnan().all()
    # the slot and the pages of the broken one, given to the next: a new sequence begins from zeros
    assert torch.equal(run(broken, [good], slots=[1], executor=executor)[0], found[0])


def test_cpu_executor_rejected_draft_tokens_leave_no_trace(models):
    _, packed = models["hybrid"]
    history, drafted, other, after = tokens(20, 6, 9, 4)
    before = opened(packed, 2)
    run(packed, [history, other], executor=before)
    for stay in (0, 4, 6):
        begun = opened(packed, 2)
        mine, theirs = (cache.slot_pools + cache.page_pools for cache in (begun.cache, before.cache))
        for one, other_one in zip(mine, theirs, strict=True):
            one.copy_(other_one)
        layout = Layout.with_cache([6, 1], [20, 9], [0, 1], [range(5), range(5, 10)], speculative=[0])
        with torch.inference_mode():
            hidden, _ = begun.run(torch.cat([drafted, after[:1]]), layout, ())
            begun.commit([0] if stay else [], [stay] if stay else [])
            next_layout = Layout.with_cache([4], [20 + stay], [0], [range(5)])
            found, _ = begun.run(after, next_layout, ())
        whole = run(packed, [torch.cat([history, drafted[:stay], after])])[0]
        assert torch.equal(found, whole[20 + stay :])
        assert torch.equal(hidden[:6], run(packed, [torch.cat([history, drafted])])[0][20:])


def test_cpu_executor_scratch_follows_the_number_of_threads(models, monkeypatch):
    _, packed = models["hybrid"]
    executor = opened(packed, 1)
    for count in (1, 3):
        monkeypatch.setattr(threads, "num_threads", lambda _, count=count: count)
        run(packed, tokens(5), executor=executor)
        assert len(executor._scratch_for(5, count).private) == count


def test_cpu_executor_draft_tokens_beyond_one_call_stay_within_scratch(models, monkeypatch):
    _, packed = models["hybrid"]
    make, guards = _Scratch.make, []

    def guarded(*sizes):
        scratch = make(*sizes)
        guard = torch.full((1000, scratch.mixed.shape[1]), 7, dtype=torch.bfloat16)
        both = torch.cat([scratch.mixed, guard])
        guards.append(both[len(scratch.mixed) :])
        return dataclasses.replace(scratch, mixed=both)

    monkeypatch.setattr(_Scratch, "make", guarded)
    count = 50
    executor = opened(packed, count)
    each = executor.cache.pages // count
    pages = [range(each * i, each * (i + 1)) for i in range(count)]
    layout = Layout.with_cache([10] * count, [0] * count, range(count), pages, speculative=range(count))
    with torch.inference_mode():
        executor.run(torch.cat(tokens(*[10] * count)), layout, ())
        executor.commit(list(range(count)), [10] * count)
    assert guards and all((guard == 7).all() for guard in guards)


def test_packed_model_runs_without_a_cache(models):
    plain, packed = models["hybrid"]
    rows = torch.randint(300, (2, 9))
    with torch.inference_mode():
        close([packed(rows)], [plain(rows)])


def test_prepare_leaves_models_alone_that_the_kernels_cannot_run(monkeypatch):
    assert not prepare(HybridLM(CONFIGS["hybrid"], seed=0))  # fp32
    narrow = HybridLM(HybridConfig(pattern="*", **SHAPE | {"head_dim": 8}), seed=0).bfloat16()
    assert not prepare(narrow)
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")
    model = HybridLM(CONFIGS["hybrid"], seed=0).bfloat16()
    assert not prepare(model)
    monkeypatch.setenv("NANOHYBRID_KERNELS", "numba")
    assert prepare(model) and isinstance(model.lm_head, PackedLinear)


def test_a_cache_of_other_dtypes_is_run_by_torch(models):
    _, packed = models["hybrid"]
    cache = HybridCache.for_context(packed.config, 1, CONTEXT, torch.float32)
    assert not CpuExecutor.holds(packed, cache) and isinstance(executor_for(packed, cache), TorchExecutor)


def test_pack_model_frees_each_weight_as_it_is_packed(monkeypatch):
    """A list of the linears to pack held all of them to the end: the 9B in int4 took twice its weights."""
    model = HybridLM(CONFIGS["hybrid"], seed=1).bfloat16().eval()
    of, seen = PackedLinear.of, []

    def watched(linear, output_dtype=None):
        assert not [one for one in seen if one() is not None]
        seen.append(weakref.ref(linear))
        return of(linear, output_dtype)

    monkeypatch.setattr(PackedLinear, "of", watched)
    pack_model(model)
    assert len(seen) > 5
