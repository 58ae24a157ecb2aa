"""Packing and loading: no target is lost, documents stay separate, batches depend on seed and step."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanohybrid.data import Batch, Loader, Mixture, Phase, TokenStore
from nanohybrid.data.packing import IGNORED, index_sequences, read_sequence
from nanohybrid.errors import ConfigError

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)
QUICK = settings(max_examples=60, deadline=None)


def make_store(lengths: list[int], first: int = 0) -> TokenStore:
    """Documents of unique tokens, so that a token tells its position; every third token has no loss."""
    documents, token = [], first
    for length in lengths:
        ids = list(range(token, token + length))
        documents.append((ids, [int(number % 3 != 0) for number in ids]))
        token += length
    return TokenStore.from_documents(documents)


def sequences(batch: Batch) -> list[tuple[list[int], list[int]]]:
    starts = batch.layout.starts
    spans = [slice(a, b) for a, b in pairwise(starts)]
    return [(batch.tokens_T[span].tolist(), batch.targets_T[span].tolist()) for span in spans]


@QUICK
@given(sizes, st.integers(1, 50))
def test_index_sequences_loses_no_target_and_crosses_no_document(
    lengths: list[int], sequence_length: int
) -> None:
    store = make_store(lengths)
    index = index_sequences(store, sequence_length)
    found = [
        read_sequence(store, *map(int, place))
        for place in zip(index.starts, index.lengths, index.document_ends, strict=True)
    ]
    targets = Counter(int(target) for _, target_ids in found for target in target_ids if target != IGNORED)
    expected = Counter(
        int(token)
        for i in range(len(store))
        for token, loss in list(zip(*store.document(i), strict=True))[1:]
        if loss
    )
    assert targets == expected
    assert all(1 <= len(tokens) <= sequence_length for tokens, _ in found)
    for tokens, target_ids in found:
        # Tokens are consecutive numbers, so a target that is its token plus one is the next token of the same
        # document.
        assert all(target in (IGNORED, token + 1) for token, target in zip(tokens, target_ids, strict=True))


@QUICK
@given(sizes, st.integers(1, 16), st.integers(0, 3))
def test_loader_reads_every_token_once_per_epoch(lengths: list[int], sequence_length: int, seed: int) -> None:
    store = make_store(lengths)
    total = int(index_sequences(store, sequence_length).lengths.sum())
    batch_tokens = max(sequence_length, 16)
    loader = Loader({"a": store}, [(1.0, {"a": 1})], batch_tokens, sequence_length, seed, total_steps=1)
    seen: Counter[int] = Counter()
    for step in range(total):  # this many steps of batch_tokens tokens are batch_tokens epochs
        seen.update(loader.batch(step).tokens_T.tolist())
    assert set(seen.values()) == {batch_tokens}


@QUICK
@given(sizes, sizes, st.integers(0, 5), st.integers(0, 10))
def test_loader_batch_depends_on_seed_and_step_alone(
    a: list[int], b: list[int], seed: int, step: int
) -> None:
    stores = {"a": make_store(a), "b": make_store(b, first=5000)}
    phases = [(0.6, {"a": 1.0, "b": 1.0}), (0.9, {"a": 1.0}), (1.0, {"b": 1.0})]

    def fresh() -> Loader:
        return Loader(stores, phases, batch_tokens=128, sequence_length=40, seed=seed, total_steps=10)

    resumed, whole = fresh(), fresh()
    for earlier in range(step):
        whole.batch(earlier)
    got, expected = resumed.batch(step), whole.batch(step)
    assert torch.equal(got.tokens_T, expected.tokens_T) and torch.equal(got.targets_T, expected.targets_T)
    assert got.layout.lengths == expected.layout.lengths and got.layout.tokens == len(got.tokens_T) > 0


@QUICK
@given(sizes, sizes, st.floats(0.2, 0.8))
def test_loader_follows_the_mixture_in_every_batch(a: list[int], b: list[int], share: float) -> None:
    stores = {"a": make_store(a), "b": make_store(b, first=5000)}
    loader = Loader(
        stores,
        [(1.0, {"a": share, "b": 1 - share})],
        batch_tokens=256,
        sequence_length=32,
        seed=1,
        total_steps=20,
    )
    for step in range(20):
        tokens = loader.batch(step).tokens_T
        assert abs(int((tokens < 5000).sum()) - share * 256) <= 33
        assert abs(int((tokens >= 5000).sum()) - (1 - share) * 256) <= 33


def test_batch_of_documents_has_targets_by_loss_mask() -> None:
    batch = Batch.of([([1, 2, 3], [0, 0, 1]), ([4, 5], [1, 1])])
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5]
    assert batch.targets_T.tolist() == [IGNORED, 3, IGNORED, 5, IGNORED]
    assert batch.layout.lengths == (3, 2) and batch.target_count == 2


def test_loader_splits_a_long_document_into_windows() -> None:
    store = TokenStore.from_documents([(list(range(10)), [1] * 10)])
    loader = Loader(
        {"a": store}, [(1.0, {"a": 1})], batch_tokens=10, sequence_length=4, seed=0, total_steps=1
    )
    assert sorted(sequences(loader.batch(0))) == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([4, 5, 6, 7], [5, 6, 7, 8]),
        ([8, 9], [9, IGNORED]),
    ]


def test_loader_orders_differ_between_epochs_and_seeds() -> None:
    stores = {"a": make_store([4] * 50)}

    def order(seed: int, step: int) -> list[int]:
        return Loader(stores, [(1.0, {"a": 1})], 200, 4, seed, total_steps=3).batch(step).tokens_T.tolist()

    first, second, other = order(0, 0), order(0, 1), order(1, 0)
    assert sorted(first) == sorted(second) == sorted(other) == list(range(200))
    assert first != second != other and first != other


def test_loader_switches_phases_at_their_steps() -> None:
    stores = {"a": make_store([8] * 20), "b": make_store([8] * 20, first=5000)}
    loader = Loader(
        stores, [(0.6, {"a": 1}), (1.0, {"b": 1})], batch_tokens=16, sequence_length=8, seed=0, total_steps=10
    )
    kinds = ["b" if loader.batch(step).tokens_T.min() >= 5000 else "a" for step in range(12)]
    assert "".join(kinds) == "aaaaaabbbbbb"
    assert loader.epochs(10) == {"a": pytest.approx(6 * 16 / 160), "b": pytest.approx(4 * 16 / 160)}


def test_mixture_divides_the_weight_of_a_group_among_its_members() -> None:
    mixture = Mixture.of([(1.0, {"text": 1, "tasks": 2})]).among(["text", "tasks-sums", "tasks-parity"])
    assert mixture.phases[0].weights == {"text": 1.0, "tasks-sums": 1.0, "tasks-parity": 1.0}


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([(0.5, {"a": 1})], "the last must be 1.0"),
        ([(0.7, {"a": 1}), (0.6, {"a": 1}), (1.0, {"a": 1})], "their ends must rise"),
        ([], "the last must be 1.0"),
        ([(1.5, {"a": 1})], "at most 1"),
        ([(1.0, {"a": -1.0})], "the weight of a is -1"),
        ([(1.0, {"a": float("nan")})], "the weight of a is nan"),
        ([(1.0, {"a": 0.0})], "no weight above 0"),
        ([(1.0, {"b": 1.0})], "names b, which is not among the stores a"),
    ],
)
def test_loader_refuses_bad_mixtures(phases: list[tuple[float, dict[str, float]]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Loader({"a": make_store([3])}, phases, 10, 10, 0, 1)


def test_loader_refuses_sizes_that_would_give_empty_batches() -> None:
    with pytest.raises(ConfigError, match="some batches would be empty"):
        Loader(
            {"a": make_store([30])},
            [(1.0, {"a": 1})],
            batch_tokens=20,
            sequence_length=64,
            seed=0,
            total_steps=5,
        )
    with pytest.raises(ConfigError, match="the store a is empty"):
        Loader(
            {"a": make_store([])},
            [(1.0, {"a": 1})],
            batch_tokens=20,
            sequence_length=64,
            seed=0,
            total_steps=5,
        )
    with pytest.raises(ConfigError, match="must be positive"):
        Loader(
            {"a": make_store([3])},
            [(1.0, {"a": 1})],
            batch_tokens=20,
            sequence_length=0,
            seed=0,
            total_steps=5,
        )
    assert Phase(1.0, {"a": 2, "b": 0}).shares == {"a": 1.0}
