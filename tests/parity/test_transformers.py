"""Our logits are transformers': whole, packed, in pieces and step by step, and again after saving.

In fp32, to 1e-4 of the largest logit. The oracle's sequence is always computed whole, without its cache.
"""

import pytest
import torch

import nanohybrid
from nanohybrid.checkpoint import load, save
from nanohybrid.model import HybridCache, HybridLM, Layout

TOLERANCE = 1e-4


def sizes(hidden, ffn, heads, kv, head_dim, mamba, mamba_dim, groups, state, chunk):
    return dict(
        hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads, num_key_value_heads=kv,
        head_dim=head_dim, mamba_num_heads=mamba, mamba_head_dim=mamba_dim, n_groups=groups,
        ssm_state_size=state, chunk_size=chunk,
    )  # fmt: skip


# pattern, sizes, length of the sequence
HYBRIDS = {
    "the family's pattern": ("M-M-M*-M-", sizes(64, 96, 4, 2, 16, 8, 8, 4, 16, 128), 63),
    "no attention": ("M-MM-", sizes(48, 56, 1, 1, 8, 6, 8, 3, 8, 16), 130),
    "only Mamba": ("MMM", sizes(48, 56, 1, 1, 8, 4, 20, 1, 48, 64), 129),
    "only attention": ("***", sizes(64, 56, 6, 3, 24, 1, 8, 1, 8, 8), 37),
    "attention and MLP": ("*-*-", sizes(64, 96, 4, 1, 16, 1, 8, 1, 8, 8), 50),
    "one group a head": ("M*-", sizes(80, 56, 5, 1, 16, 5, 12, 5, 16, 64), 127),
    "one group": ("M*M", sizes(48, 56, 2, 2, 8, 6, 8, 1, 16, 32), 17),
    "eight groups, odd widths": ("M-*", sizes(104, 200, 10, 2, 8, 16, 4, 8, 10, 128), 128),
    "wide state": ("MM*", sizes(64, 56, 2, 1, 16, 2, 12, 2, 128, 128), 65),
    "inner width unlike twice the hidden": ("M*M-", sizes(48, 56, 4, 4, 24, 3, 40, 3, 16, 64), 40),
    "short chunks, long text": ("M*-M", sizes(48, 56, 4, 2, 8, 4, 8, 2, 8, 8), 301),
    "a key head a query": ("-*M", sizes(64, 96, 4, 4, 16, 4, 8, 2, 16, 128), 5),
    "a single layer": ("M", sizes(48, 56, 1, 1, 8, 4, 8, 4, 8, 128), 3),
    "a single token": ("M*-", sizes(48, 56, 2, 1, 8, 4, 8, 2, 8, 128), 1),
}
DENSE = {
    "untied": (
        dict(
            hidden_size=48,
            intermediate_size=88,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=12,
        ),
        131,
    ),
    "tied": (
        dict(
            hidden_size=64,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=24,
            tie_word_embeddings=True,
        ),
        45,
    ),
    "another theta": (
        dict(
            hidden_size=48,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=5,
            num_key_value_heads=1,
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        70,
    ),
}


SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 5e5,
    },
    "yarn": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6,
    },
}  # fmt: skip
SMALL = dict(
    hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512,
)  # fmt: skip
LLAMAS = {
    "plain": ("llama", SMALL, 131),
    "tied, as SmolLM2": ("llama", SMALL | dict(tie_word_embeddings=True, num_attention_heads=8), 63),
    "head width of its own": ("llama", SMALL | dict(head_dim=24, num_key_value_heads=4), 40),
    "Mistral": ("mistral", SMALL | dict(sliding_window=None, num_key_value_heads=4), 50),
    "Mistral, heads beside the hidden size": (
        "mistral", SMALL | dict(sliding_window=None, hidden_size=72, num_attention_heads=5,
                                num_key_value_heads=1, head_dim=16), 33,
    ),
} | {
    f"{name} scaling": ("llama", SMALL | dict(rope_parameters=rope), 300) for name, rope in SCALED.items()
}  # fmt: skip


def assert_equal(got, want, tolerance=TOLERANCE):
    assert got.shape == want.shape
    error = (got - want).abs().max() / want.abs().max()
    assert error < tolerance, f"differs by {error:.1e} of the largest logit"


@torch.no_grad()
def in_pieces(model, tokens_BT, lengths):
    """Logits [B, T, V] of a batch that is computed in pieces of these lengths, through stored state, from
    slots out of order."""
    batch, total = tokens_BT.shape
    slots = list(range(batch, 0, -1))
    state = HybridCache.for_context(model.config, batch + 1, total, dtype=torch.float32)
    for pool in (pool for layer in state.layers for pool in layer.values()):
        pool.fill_(float("nan"))  # a sequence that begins must not read what lay there
    logits, at = [], 0
    for length in lengths:
        layout = Layout.contiguous([length] * batch, [at] * batch, slots, context=total)
        logits.append(
            model(tokens_BT[:, at : at + length].flatten(), layout=layout, cache=state).unflatten(
                0, (batch, length)
            )
        )
        at += length
    return torch.cat(logits, dim=1)


@torch.no_grad()
def check(oracle, length, directory, reopened, tolerance=TOLERANCE):
    """Everything that must agree with one oracle."""
    oracle.save_pretrained(directory / "theirs")
    model = load(directory / "theirs")
    tokens_BT = torch.randint(0, oracle.config.vocab_size, (2, length))
    want_BTV = oracle(tokens_BT, use_cache=False).logits
    assert_equal(model(tokens_BT), want_BTV, tolerance)

    cut = max(1, length // 3)
    packed_T = torch.cat([tokens_BT[0, :cut], tokens_BT[1], tokens_BT[0]])
    want_TV = torch.cat([want_BTV[0, :cut], want_BTV[1], want_BTV[0]])
    assert_equal(model(packed_T, layout=Layout.packed([cut, length, length])), want_TV, tolerance)
    parts = [cut, length - cut] if length > 1 else [1]
    assert_equal(in_pieces(model, tokens_BT, parts), want_BTV, tolerance)
    steps = min(6, length - 1)
    assert_equal(in_pieces(model, tokens_BT, [length - steps] + [1] * steps), want_BTV, tolerance)

    save(model, directory / "ours")
    assert_equal(reopened(directory / "ours")(tokens_BT, use_cache=False).logits, want_BTV, tolerance)


@pytest.mark.parametrize("name", HYBRIDS, ids=lambda name: name.replace(" ", "-"))
def test_hybrid_logits_equal_transformers(name, nemotron, tmp_path, reopened):
    pattern, shape, length = HYBRIDS[name]
    check(nemotron(pattern, **shape), length, tmp_path, reopened)


@pytest.mark.parametrize("name", DENSE, ids=lambda name: name.replace(" ", "-"))
def test_dense_logits_equal_transformers_qwen3(name, qwen, tmp_path, reopened):
    shape, length = DENSE[name]
    check(qwen(**shape), length, tmp_path, reopened)


@pytest.mark.parametrize("name", LLAMAS, ids=lambda name: name.replace(" ", "-"))
def test_dense_logits_equal_transformers_llama(name, llama, tmp_path, reopened):
    kind, shape, length = LLAMAS[name]
    check(llama(kind, **shape), length, tmp_path, reopened, tolerance=1e-5)


@pytest.mark.parametrize("name", SCALED)
def test_scaled_qwen3_logits_equal_transformers(name, qwen, tmp_path, reopened):
    oracle = qwen(**SMALL, head_dim=16, rope_parameters=SCALED[name])
    check(oracle, 300, tmp_path, reopened, tolerance=1e-5)


@torch.no_grad()
def test_stepwise_logits_from_the_first_token_equal_the_full_forward(nemotron, tmp_path):
    oracle = nemotron("M*-M", **sizes(48, 56, 4, 2, 8, 4, 8, 2, 8, 16))
    oracle.save_pretrained(tmp_path)
    tokens_BT = torch.randint(0, 96, (3, 24))
    assert_equal(in_pieces(load(tmp_path), tokens_BT, [1] * 24), oracle(tokens_BT, use_cache=False).logits)


@torch.no_grad()
def test_transformers_loads_a_tied_hybrid_with_its_head(nemotron, tmp_path, reopened):
    nemotron("M*-", **sizes(48, 56, 4, 2, 8, 4, 8, 2, 8, 16)).save_pretrained(tmp_path / "theirs")
    untied = load(tmp_path / "theirs")
    model = HybridLM(untied.config.replace(tie_word_embeddings=True))
    model.load_state_dict(
        {name: tensor for name, tensor in untied.state_dict().items() if name != "lm_head.weight"}
    )
    save(model, tmp_path / "ours")
    tokens_BT = torch.randint(0, 96, (1, 9))
    assert_equal(reopened(tmp_path / "ours")(tokens_BT, use_cache=False).logits, model(tokens_BT))
    assert load(tmp_path / "ours").config.tie_word_embeddings


@torch.no_grad()
def test_shards_are_read_by_both_libraries(nemotron, tmp_path, reopened):
    oracle = nemotron("M*-M", **sizes(48, 56, 4, 2, 8, 4, 8, 2, 8, 16))
    oracle.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model = load(tmp_path / "theirs")
    save(model, tmp_path / "ours", max_shard_bytes=20_000)
    tokens_BT = torch.randint(0, 96, (1, 20))
    want_BTV = oracle(tokens_BT, use_cache=False).logits
    assert_equal(model(tokens_BT), want_BTV)
    assert_equal(reopened(tmp_path / "ours")(tokens_BT, use_cache=False).logits, want_BTV)


def test_transformers_refuses_a_model_of_our_own_type(tmp_path, reopened):
    save(HybridLM(nanohybrid.preset("tiny").replace(rope_theta=1e4), seed=0), tmp_path)
    with pytest.raises(ValueError, match="nanohybrid"):
        reopened(tmp_path)
