"""SSM states in fp16, and keys and values in FP8: half the memory, and the same guarantees."""

import random
from dataclasses import replace

import pytest
import torch

import nanohybrid
from nanohybrid.engine.engine import Engine
from nanohybrid.engine.params import SamplingParams
from nanohybrid.errors import InputError
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.serving import plan_slots
from nanohybrid.model import HybridCache, Layout
from nanohybrid.ops.attention import PagedCache, attention
from nanohybrid.ops.attention.cache import dequantize, quantize

NARROW = {"mamba_ssm_cache_dtype": "fp16", "kv_cache_dtype": "fp8"}
NARROW_DTYPES = {"state_dtype": torch.float16, "kv_dtype": torch.float8_e4m3fn}
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.7, seed=3, logprobs=True)


def prompts():
    rng = random.Random(4)
    return [[rng.randrange(13, 269) for _ in range(length)] for length in (1, 5, 127, 128, 130, 300)]


def test_cache_of_narrow_dtypes_has_the_bytes_of_footprint_and_plan():
    config = nanohybrid.preset("tiny")
    wide, narrow = Footprint.of(config, torch.bfloat16), Footprint.of(config, torch.bfloat16, **NARROW_DTYPES)
    state = HybridCache.allocate(config, 3, 5, dtype=torch.bfloat16, **NARROW_DTYPES)
    assert state.bytes == 3 * narrow.state_bytes_per_sequence + 5 * 128 * narrow.kv_bytes_per_token
    ssm = config.mamba_inner_size * config.ssm_state_size * config.pattern.count("M")
    assert wide.state_bytes_per_sequence - narrow.state_bytes_per_sequence == 2 * ssm
    row = config.num_key_value_heads * config.pattern.count("*")
    assert narrow.kv_bytes_per_token == 2 * row * (config.head_dim + 2)
    assert plan_slots(config, narrow, 4, 1000).state_bytes == 4 * narrow.state_bytes_per_sequence


@pytest.mark.parametrize("options", [{"mamba_ssm_cache_dtype": "fp16"}, {"kv_cache_dtype": "fp8"}, NARROW])
def test_narrow_cache_gives_the_same_bits_in_any_batch_cached_or_preempted(model, tokenizer, options):
    """The stochastic rounding of a state depends on neither its slot nor the other requests."""
    more = {"max_model_len": 400, "deterministic": True, **options}
    alone = [Engine(model, tokenizer, max_num_seqs=1, **more).generate([p], PARAMS)[0] for p in prompts()]
    engine = Engine(
        model,
        tokenizer,
        max_num_seqs=3,
        max_num_batched_tokens=200,
        prefix_cache_bytes=2**24,
        prefix_cache_interval=128,
        **more,
    )
    for turn in range(2):
        order = random.Random(turn).sample(range(6), 6)
        requests = {i: engine.add(prompts()[i], PARAMS) for i in order}
        steps = 0
        while engine.busy:
            engine.step()
            steps += 1
            if steps % 4 == 0 and engine.scheduler.running:
                engine.scheduler.preempt(next(iter(engine.scheduler.running.values())))
        for i, request in requests.items():
            assert replace(request.completion(), cached_tokens=0, cache_miss="off") == alone[i]
    assert request.num_cached_tokens or engine.prefix_cache.hits


def test_narrow_cache_with_drafts_stays_close_to_one_without(model, tokenizer):
    """The state after each token of a draft is rounded as if it had been stored."""
    wanted = Engine(model, tokenizer, max_num_seqs=1, max_model_len=400, **NARROW).generate(prompts(), PARAMS)
    engine = Engine(model, tokenizer, max_num_seqs=6, max_model_len=400, num_speculative_tokens=7, **NARROW)
    rng = random.Random(1)
    engine.scheduler.propose = lambda request, limit: [
        *wanted[request.id].token_ids[len(request.tokens) :][: rng.randrange(6)],
        rng.randrange(13, 269),
    ][: min(limit, 7)]
    for got, expected in zip(engine.generate(prompts(), PARAMS), wanted, strict=True):
        # A product that rounds differently changes the last bit of a state.
        assert got.logprobs == pytest.approx(expected.logprobs, abs=0.15)
        assert got.token_ids[:3] == expected.token_ids[:3]
    assert engine.proposer.num_accepted_tokens > 50


def test_stochastic_rounding_depends_on_the_seed(model, tokenizer):
    greedy = replace(PARAMS, temperature=0.0)
    engine = Engine(model, tokenizer, max_num_seqs=1, max_model_len=400, mamba_ssm_cache_dtype="fp16")
    first, again, other = (
        engine.generate([prompts()[2]], replace(greedy, seed=seed))[0].logprobs for seed in (1, 1, 2)
    )
    assert first == again != other and first == pytest.approx(other, abs=0.2)


def test_stochastic_rounding_drifts_less_than_rounding_to_nearest(model):
    """A small input into a slowly decaying state: rounded to nearest, it stops far below its limit."""
    from nanohybrid.model.mixers.stochastic_rounding import Rounding

    exact, nearest, drawn = torch.zeros(1, 64, dtype=torch.float64), torch.zeros(1, 64), torch.zeros(1, 64)
    for step in range(4000):
        exact = exact * 0.9999 + 1e-4
        nearest = (nearest * 0.9999 + 1e-4).half().float()
        layout = Layout.with_cache([1], [step], [0], [range(40)])
        drawn = Rounding.of(layout, 0, drawn.device).after(drawn * 0.9999 + 1e-4, -1).float()
    assert abs(nearest / exact - 1).mean() > 0.2 > 10 * abs(drawn.mean() / exact.mean() - 1)


def test_fp8_rows_have_three_mantissa_bits_beside_their_scale():
    x = torch.randn(50, 3, 64) * torch.logspace(-6, 6, 50)[:, None, None]
    x[7] = 0
    codes, scale = quantize(x)
    back = dequantize(codes.view(torch.uint8), scale)
    error = (back - x).abs() / x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert error.max() < 2**-4 and error[7].max() == 0 and torch.equal(back[7], x[7])
    x[3, 1, 5] = float("nan")
    codes, scale = quantize(x)
    assert dequantize(codes.view(torch.uint8), scale)[3, 1].isnan().any(), "a NaN was hidden"


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_attention_over_fp8_pages_equals_attention_over_dequantized_ones(form, monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", form)
    layout = Layout.with_cache([1, 3, 1], [20, 9, 31], [0, 1, 2], [(3, 1), (0,), (5, 4)], page_size=16)
    pool = lambda *shape, dtype: torch.zeros(*shape, dtype=dtype)  # noqa: E731
    eight = PagedCache(
        *(pool(6, 16, 2, 8, dtype=torch.float8_e4m3fn) for _ in range(2)),
        *(pool(6, 16, 2, dtype=torch.bfloat16) for _ in range(2)),
    )
    before = Layout.with_cache([20, 9, 31], [0, 0, 0], [0, 1, 2], layout.pages, 16)
    eight.write(torch.randn(60, 2, 8), torch.randn(60, 2, 8), before)
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    found = attention(q, k, v, layout, eight)
    plain = PagedCache(
        dequantize(eight.key.view(torch.uint8), eight.key_scale),
        dequantize(eight.value.view(torch.uint8), eight.value_scale),
    )
    rounded = [dequantize(codes.view(torch.uint8), scale) for codes, scale in (quantize(k), quantize(v))]
    assert (found - attention(q, *rounded, layout, plain)).abs().max() < 1e-5


@pytest.mark.parametrize("bad", [{"mamba_ssm_cache_dtype": "bf16"}, {"kv_cache_dtype": "int8"}])
def test_unknown_cache_dtype_is_refused_in_one_line(model, tokenizer, bad):
    with pytest.raises(InputError, match="must be one of"):
        Engine(model, tokenizer, **bad)
