"""The shared real model: transformers holds a sensible conversation with its directory."""

import pytest
import torch
from real_model import smollm2, smollm2_directory


def test_the_file_is_a_gguf_file():
    assert smollm2().read_bytes()[:4] == b"GGUF"


def test_transformers_answers_a_question_from_the_directory():
    transformers = pytest.importorskip("transformers")
    directory = smollm2_directory()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])
