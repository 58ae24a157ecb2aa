"""SmolLM2 at work: transformers' greedy answers, a conversation, structured output, speculation."""

import json

import pytest
import torch
from real_model import smollm2_directory

from nanohybrid import LLM, SamplingParams
from nanohybrid.cli.conversation import Conversation
from nanohybrid.engine import StructuredOutputs
from nanohybrid.engine.engine import Engine

from .conftest import transformers

pytestmark = pytest.mark.slow  # fp32 on one core: a second a token
QUESTIONS = [
    "What is the capital of France? Answer with one sentence.",
    "Name three colors.",
    "Write a haiku about the sea.",
]


@pytest.fixture(scope="module")
def llm():
    return LLM(smollm2_directory(), "fp32", max_num_seqs=4)


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(llm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_directory())
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_directory(), dtype=torch.float32).eval()
    prompts = [llm.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    ours = llm.generate(prompts, SamplingParams(max_tokens=24))
    for question, prompt, answer in zip(QUESTIONS, prompts, ours, strict=True):
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompt == ids
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        assert answer.token_ids == theirs.tolist()


def test_a_conversation_keeps_to_its_subject(llm):
    engine = Engine(llm.model, llm.tokenizer, max_num_seqs=1, max_model_len=512)
    talk = Conversation(llm, engine, SamplingParams(max_tokens=40))
    questions = (QUESTIONS[0], "In which country is that city?")
    answers = ["".join(delta.text for delta in talk.ask(question)) for question in questions]
    assert "Paris" in answers[0] and "France" in answers[1]


def test_structured_output_has_the_facts_of_the_text(llm):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
        "required": ["name", "age", "city"],
    }
    params = SamplingParams(max_tokens=60, structured_outputs=StructuredOutputs(json=schema))
    question = "John is 34 years old and lives in Boston. Give his name, age and city as JSON."
    answer = llm.chat([{"role": "user", "content": question}], params)
    assert json.loads(answer.text) == {"name": "John", "age": 34, "city": "Boston"}


def test_speculation_writes_the_same_text_in_fewer_steps(llm):
    text = "The tower was built in 1823 by Mary Ross. It is 40 meters high and stands in Leith."
    prompt = llm.encode_chat([{"role": "user", "content": f"Repeat this text word for word: {text}"}])
    texts, steps = [], []
    for drafts in (0, 4):
        engine = Engine(
            llm.model, llm.tokenizer, max_num_seqs=1, max_model_len=256, num_speculative_tokens=drafts
        )
        request = engine.add(prompt, SamplingParams(max_tokens=32))
        count = 0
        while not request.finished:
            engine.step()
            count += 1
        texts.append(request.completion().token_ids)
        steps.append(count)
    assert texts[0] == texts[1] and steps[1] < 0.7 * steps[0]
