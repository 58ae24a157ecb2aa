"""The engine on another device: what `generate`, `serve` and `verify` run on by default where there is a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mock_cuda import mock_cuda_device

from nanohybrid.cli.main import main
from nanohybrid.engine import LLM, SamplingParams

PROMPTS = ["run 1+2*3", "1+2=3\n3*3=9\n1+2=3\n3*3", "System"]
CHOSEN = {
    "sampled": SamplingParams(
        8, temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, seed=3, logprobs=True, top_logprobs=2
    ),
    "edited": SamplingParams(
        8,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        logit_bias={20: 2.0, 21: -100.0},
    ),
    "thinking": SamplingParams(12, thinking_budget=3, ignore_eos=True),
}


@pytest.mark.parametrize("kind", CHOSEN)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_speculative_tokens": 3},
        {"mamba_ssm_cache_dtype": "fp16", "kv_cache_dtype": "fp8"},
        {"quantize": "int4"},
        {"prefix_cache_bytes": 2**20},
        {"deterministic": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_engine_on_cuda_generates_the_tokens_of_the_cpu(
    parent: Path, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")

    def said(device: str) -> list[list[int]]:
        llm = LLM(parent, torch.float32, device, max_num_seqs=4, **options)
        return [completion.token_ids for _ in range(2) for completion in llm.generate(PROMPTS, CHOSEN[kind])]

    wanted = said("cpu")
    with mock_cuda_device() as count:
        assert said("cuda") == wanted
    assert count[0] > 0


def test_verify_passes_on_cuda(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")
    with mock_cuda_device() as count:
        assert main(["verify", str(parent)]) == 0
    assert count[0] > 0
