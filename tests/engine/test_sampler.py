import math
import random

import pytest
import torch

from nanohybrid.engine.params import SamplingParams
from nanohybrid.engine.sampler import (
    SamplingMetadata,
    apply_min_p,
    apply_top_k,
    apply_top_p,
    sample,
    threshold_by_bisection,
    uniform,
)
from nanohybrid.errors import InputError

transformers = pytest.importorskip("transformers")


def logits(rows, width, scale=3.0, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("width", [7, 512, 3000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_top_k_top_p_and_min_p_keep_what_transformers_keeps(width, scale):
    scores = logits(6, width, scale)
    for value in (1, 2, 50, width, 10**6):
        ours = apply_top_k(scores, torch.full((6, 1), float(value)), value)
        assert torch.equal(ours, transformers.TopKLogitsWarper(value)(None, scores))
    for value in (0.01, 0.5, 0.9, 0.999):
        ours = apply_top_p(scores, torch.full((6, 1), value))
        theirs = transformers.TopPLogitsWarper(value)(None, scores)
        assert (ours.isfinite() != theirs.isfinite()).sum(dim=-1).max() <= 1  # the sums run in another order
        assert (ours.isfinite().sum(dim=-1) >= 1).all()
        ours = apply_min_p(scores, torch.full((6, 1), value))
        assert torch.equal(ours.isfinite(), transformers.MinPLogitsWarper(value)(None, scores).isfinite())


def test_top_p_of_a_flat_row_looks_beyond_the_first_candidates():
    scores = torch.cat([logits(1, 5000, 0.01), logits(1, 5000, 9.0)])
    selected = apply_top_p(scores, torch.full((2, 1), 0.9)).isfinite()
    wanted = transformers.TopPLogitsWarper(0.9)(None, scores).isfinite()
    assert 4000 < selected[0].sum() < 5000 and ((selected != wanted).sum(dim=-1) <= 2).all()


def test_top_k_and_top_p_keep_equal_logits_together():
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert apply_top_k(scores, torch.tensor([[1.0]]), 1).isfinite().tolist() == [[False, True, True, False]]
    assert apply_top_p(scores, torch.tensor([[0.1]])).isfinite().tolist() == [[False, True, True, False]]


def test_sampled_frequencies_match_the_probabilities():
    draws, scores = 4000, logits(1, 12, 1.0)
    params = SamplingParams(temperature=0.7)
    rows = SamplingMetadata([params] * draws, list(range(draws)))
    for positions in ([5] * draws, list(range(draws))):  # neighboring seeds, then neighboring positions too
        tokens = torch.tensor(sample(scores.expand(draws, -1), rows, positions).tokens)
        expected = (scores[0] / 0.7).softmax(-1) * draws
        chi_square = ((tokens.bincount(minlength=12) - expected) ** 2 / expected).sum().item()
        assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001


def test_uniform_is_uniform_and_independent_of_seed_and_position():
    grid = uniform(torch.arange(-500, 500).repeat_interleave(64), torch.arange(64).repeat(1000)).view(
        1000, 64
    )
    assert grid.min() >= 0 and grid.max() < 1
    assert abs(grid.mean() - 0.5) < 0.005 and abs(grid.std() - 12**-0.5) < 0.005
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1]) < 0.02


def splitmix(word):
    mask = (1 << 64) - 1
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 5, 12345678901234567890])
def test_uniform_is_splitmix64_in_unsigned_arithmetic(seed):
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    rows = SamplingMetadata([SamplingParams(temperature=1.0, seed=seed)], [seed])
    got = uniform(rows.seed_R, torch.tensor([77])).item()
    word = splitmix((splitmix(((seed & mask) + golden) & mask) + 77 * golden) & mask)
    assert got == (word >> 16 & (1 << 48) - 1) / (1 << 48)


def random_params(rng):
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
        top_k=rng.choice([0, 1, 5, 300]),
        top_p=rng.choice([1.0, 0.9, 0.2]),
        min_p=rng.choice([0.0, 0.05, 1.0]),
        logprobs=rng.random() < 0.5,
    )


def test_sample_of_a_row_does_not_depend_on_other_rows():
    rng = random.Random(3)
    for _ in range(20):
        count = rng.randint(1, 9)
        params, seeds = (
            [random_params(rng) for _ in range(count)],
            [rng.getrandbits(70) for _ in range(count)],
        )
        positions, scores = (
            [rng.randint(0, 10**6) for _ in range(count)],
            logits(count, 400, seed=rng.getrandbits(30)),
        )
        together = sample(scores, SamplingMetadata(params, seeds), positions)
        for row in range(count):
            alone = sample(
                scores[row : row + 1],
                SamplingMetadata(params[row : row + 1], seeds[row : row + 1]),
                positions[row : row + 1],
            )
            assert alone.tokens[0] == together.tokens[row]
            if alone.logprobs:
                assert together.logprobs is not None and alone.logprobs[0] == pytest.approx(
                    together.logprobs[row], abs=1e-6
                )


def test_sample_applies_all_filters_in_the_order_of_transformers():
    rng = random.Random(4)
    params = [random_params(rng) for _ in range(200)]
    scores = logits(200, 400)
    tokens = sample(scores, SamplingMetadata(params, list(range(200))), [9] * 200).tokens
    for row, p in enumerate(params):
        warped = scores[row : row + 1]
        if p.temperature == 0:
            assert tokens[row] == warped.argmax()
            continue
        warped = transformers.TemperatureLogitsWarper(p.temperature)(None, warped)
        warped = transformers.TopKLogitsWarper(p.top_k)(None, warped) if p.top_k else warped
        warped = transformers.TopPLogitsWarper(p.top_p)(None, warped) if p.top_p < 1 else warped
        warped = transformers.MinPLogitsWarper(p.min_p)(None, warped) if p.min_p else warped
        assert warped[0, tokens[row]].isfinite()


def test_logprobs_are_those_of_the_distribution_before_the_filters():
    scores = logits(3, 50)
    params = [SamplingParams(temperature=t, logprobs=True, top_k=3, seed=1) for t in (0.0, 1.0, 0.5)]
    out = sample(scores, SamplingMetadata(params, [1, 2, 3]), [4, 5, 6])
    for row, temperature in enumerate((1.0, 1.0, 0.5)):
        wanted = (scores[row] / temperature).log_softmax(-1)[out.tokens[row]].item()
        assert out.logprobs[row] == pytest.approx(wanted, abs=1e-5)


def test_forced_token_has_its_own_logprob():
    scores = logits(2, 50)
    out = sample(
        scores, SamplingMetadata([SamplingParams(logprobs=True)] * 2, [0, 0]), [1, 1], forced=[(1, 7)]
    )
    assert out.tokens == [scores[0].argmax().item(), 7]
    assert out.logprobs[1] == pytest.approx(scores[1].log_softmax(-1)[7].item(), abs=1e-5)


def test_tiny_temperature_is_greedy_and_does_not_overflow():
    scores = logits(4, 300) * 1e4
    out = sample(
        scores, SamplingMetadata([SamplingParams(temperature=1e-30, top_p=0.5)] * 4, [1, 2, 3, 4]), [0] * 4
    )
    assert out.tokens == scores.argmax(-1).tolist()


def test_non_finite_row_is_reported_and_changes_no_other():
    scores = logits(3, 20)
    scores[1, 4] = math.nan
    out = sample(scores, SamplingMetadata([SamplingParams(temperature=1.0)] * 3, [1, 2, 3]), [0] * 3)
    assert out.non_finite == [1] and all(0 <= token < 20 for token in out.tokens)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": 2},
        {"top_k": -1},
        {"min_p": 1.5},
        {"max_tokens": 0},
        {"thinking_budget": -1},
        {"stop": ("",)},
        {"temperature": 1e39},
        {"temperature": 10**400},
        {"top_k": 2**31},
        {"presence_penalty": 1e39},
        {"frequency_penalty": math.nan},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": math.inf},
        {"logit_bias": {3: 1e39}},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {2**70: 1.0}},
    ],
)
def test_sampling_params_out_of_range_are_refused_by_name(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        SamplingParams(**bad)


@pytest.mark.parametrize("V", [1, 7, 300])
def test_top_p_threshold_by_bisection_equals_that_by_sorting(V):
    """Bisection is the form for GPUs, since it needs no result on the host."""
    probability_RV = (torch.randn(40, V) * 3).round(decimals=1).softmax(-1)
    p_R1 = torch.rand(40, 1)
    best_RV = probability_RV.sort(descending=True).values
    count_R1 = (best_RV.double().cumsum(-1) < p_R1.double()).sum(-1, keepdim=True).clamp(max=V - 1)
    selected = probability_RV >= best_RV.gather(1, count_R1)
    assert torch.equal(probability_RV >= threshold_by_bisection(probability_RV, p_R1), selected)
