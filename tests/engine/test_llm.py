import pytest
import torch

from nanohybrid.checkpoint import save
from nanohybrid.engine import LLM, Engine, SamplingParams
from nanohybrid.engine.random_weights import random_model, stand_in_tokenizer
from nanohybrid.model.quantized import quantize_model
from nanohybrid.presets import preset


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    save(model, directory)
    tokenizer.save(directory)
    return directory


def test_llm_from_a_checkpoint_equals_an_engine_of_its_model(checkpoint, model, tokenizer):
    llm, params = LLM(checkpoint), SamplingParams(max_tokens=8, ignore_eos=True)
    assert llm.model.dtype == torch.float32  # the checkpoint's own
    ids = tokenizer.encode("hi", bos=True)
    assert llm.generate(["hi", ids], params) == Engine(
        model, tokenizer, max_num_seqs=2, max_model_len=50
    ).generate([ids, ids], params)


def test_llm_chat_thinks_unless_told_not_to(checkpoint):
    llm, messages = LLM(checkpoint, dtype=torch.bfloat16), [{"role": "user", "content": "hi"}]
    params = SamplingParams(max_tokens=30, thinking_budget=3, thinking_grace=1, ignore_eos=True)
    assert llm.chat(messages, params).thinking_end in ("newline", "forced")
    assert llm.chat(messages, params, thinking=False).thinking_end == "none"


def test_random_weights_have_the_scales_of_the_initialization_rules():
    from nanohybrid.model import HybridLM

    config = preset("tiny").replace(vocab_size=40_000)  # large enough for repetition
    quick, drawn = random_model(config, torch.float32, seed=1), HybridLM(config, seed=1)
    for name, parameter in quick.named_parameters():
        wanted = drawn.get_parameter(name)
        assert parameter.shape == wanted.shape
        if parameter.numel() >= 128:  # a handful of numbers has no scale
            assert parameter.std(correction=0) == pytest.approx(
                wanted.std(correction=0).item(), rel=0.25, abs=1e-3
            ), name
    rows = quick.head_weight
    assert len(rows.unique(dim=0)) == len(rows)


def test_random_weights_quantized_while_made_equal_those_quantized_afterwards():
    config = preset("tiny").replace(vocab_size=40_000)  # the head is large enough for repetition
    streamed, whole = (
        random_model(config, torch.bfloat16, seed=1, quantize="int4"),
        random_model(config, torch.bfloat16, seed=1),
    )
    quantize_model(whole, "int4")
    for name, buffer in whole.state_dict().items():
        assert torch.equal(streamed.state_dict()[name], buffer), name


def test_stand_in_tokenizer_has_the_size_of_the_vocabulary():
    tokenizer = stand_in_tokenizer(preset("tiny"))
    assert tokenizer.vocab_size == 512 and tokenizer.decode([*tokenizer.encode("aé"), 300]) == "aé⟨300⟩"
