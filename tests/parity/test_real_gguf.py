"""SmolLM2 from its GGUF file: logits of transformers on the same weights, of llama.cpp on the same file."""

import numpy as np
import pytest
import torch
from real_model import smollm2, smollm2_directory

from nanohybrid import LLM, SamplingParams, load
from nanohybrid.checkpoint import CheckpointReader

from .conftest import transformers

MISSING = "llama-cpp-python is not installed: a benchmark's dependency, built from source"
PROMPT = [{"role": "user", "content": "What is the capital of France? Answer with one sentence."}]
TEXT = """The history of the lighthouse begins in 1823, when a storm sank four ships in one night. The town
council voted for a tower of stone, "higher than any wave", and paid £2,300 for it; def light(n): return n"""


@pytest.fixture(scope="module")
def ids():
    llm_ids = transformers.AutoTokenizer.from_pretrained(smollm2_directory())(TEXT)["input_ids"]
    assert len(llm_ids) > 50
    return torch.tensor(llm_ids)


def test_weights_are_those_of_the_gguf_package():
    with CheckpointReader(smollm2()) as file, CheckpointReader(smollm2_directory()) as directory:
        assert set(file.names()) == set(directory.names())
        for name in file.names():
            assert torch.equal(file.tensor(name, torch.float32), directory.tensor(name)), name


@torch.no_grad()
def test_logits_are_those_of_transformers(ids):
    theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(smollm2_directory()).eval()(ids[None]).logits[0]
    )
    ours = load(smollm2(), torch.float32).eval()(ids[None])[0]
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert (ours - theirs).abs().max() < 1e-3


@torch.no_grad()
def test_logits_are_near_those_of_llama_cpp(ids):
    """It multiplies quantized weights with activations that it rounds to 8 bits; its keys are fp16."""
    llama_cpp = pytest.importorskip("llama_cpp", reason=MISSING)
    model = llama_cpp.Llama(str(smollm2()), n_ctx=256, logits_all=True, n_threads=1, verbose=False)
    model.eval(ids.tolist())
    theirs = torch.from_numpy(np.array(model.scores[: len(ids)]))
    ours = load(smollm2(), torch.float32).eval()(ids[None])[0]
    assert (ours - theirs).norm() / ours.norm() < 0.03
    divergence = (ours.log_softmax(-1).exp() * (ours.log_softmax(-1) - theirs.log_softmax(-1))).sum(-1)
    assert divergence.mean() < 0.01
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as by default", "fp32"])
def test_the_file_answers_a_question(dtype):
    answer = LLM(smollm2(), dtype).chat(PROMPT, SamplingParams(max_tokens=24))
    assert "Paris" in answer.text and answer.finish_reason == "stop"
