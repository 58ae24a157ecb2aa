"""kill -9 at any moment of any step of a compression: the same command then ends in the same bytes."""

import signal

import pytest
from compress_kill import compress_in_a_process
from compress_models import write_parent

BYTES = (
    "model.safetensors",
    "config.json",
    "pruning_mask.json",
    "kept.json",
    "importance/importance.safetensors",
    "search/search.json",
    "pruned/model.safetensors",
    "distilled/model.safetensors",
    "aligned/1-sft/model.safetensors",
    "aligned/2-grpo/model.safetensors",
    "aligned/3-merge/model.safetensors",
    "quantized/model.safetensors",
    "model-q8_0.gguf",
    "metrics/search.jsonl",
    "metrics/successive_halving.jsonl",
    "aligned/2-grpo/metrics/rollouts.jsonl",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A parent, documents, and what an uninterrupted run makes of them."""
    root = write_parent(tmp_path_factory.mktemp("kill"))
    assert compress_in_a_process(root, root / "whole", None) == 0
    return root


def killed_and_resumed(root, out, share):
    """Kill a run at a share of its events, take it up again, and compare every byte that is a result."""
    events = int((root / "whole.events").read_text())
    assert events > 100
    assert compress_in_a_process(root, out, max(1, round(share * events))) == -signal.SIGKILL
    assert not out.exists()
    assert compress_in_a_process(root, out, None) == 0
    for name in BYTES:
        assert (out / name).read_bytes() == (root / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("share", [0.6, 0.96])
def test_killed_compression_resumes_to_the_same_bytes(root, tmp_path, share):
    killed_and_resumed(root, tmp_path / "out", share)


@pytest.mark.slow
@pytest.mark.parametrize("place", range(24))
def test_compression_killed_at_any_write_resumes_to_the_same_bytes(root, tmp_path, place):
    killed_and_resumed(root, tmp_path / "out", (place + 0.5) / 24)
