"""llama.cpp computes from our files what we compute: logits, greedy text, ids of texts, the chat prompt.

llama-cpp-python has no wheel for CPUs on PyPI and takes ten minutes to build, so these tests are skipped
where it is not installed: `pip install llama-cpp-python` needs a C++ compiler. Measured against 0.3.36.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from real_model import smollm2

from nanohybrid import LLM
from nanohybrid.checkpoint import load, save
from nanohybrid.config import HybridConfig
from nanohybrid.engine import SamplingParams
from nanohybrid.export import GgufExport
from nanohybrid.model import HybridLM
from nanohybrid.text import ChatTemplate, Tokenizer, tekken, train_bpe

from .conftest import CONFIGS, HYBRID, random_model

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: a benchmark's dependency, built from source"
)
F32 = 0  # llama.cpp's number of it, for keys and values
MESSAGES = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Why? /no_think"}],
    [
        {"role": "system", "content": "Be brief. /think"},
        {"role": "user", "content": "What ends a </think> trace?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIts mark."},
        {"role": "user", "content": "  a/think b  東京 naïve\n\n"},
    ],
]
TEXTS = [
    "", " ", "\n\n\r\n \t x\n", "fn main() { let x: Vec<u8> = vec![0x1F; 1_000]; }  // 3.14159e-10",
    "price: $1,234.56 (−7 %) “quoted” don't DON'T iPhone HTTPServer "
    "aB", "École ÉCOLE éCOLE Größe STRASSE ПриветМир ПРИВЕТ",
    "東京は日本の首都です。人口は約1400万人。 한국어 문장입니다. 中文分词测试，没有空格。 שלום עולם",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 e\u0301 \u200b\ufeff \u00a0x",
    "a" * 300, "\x00\x00\x00",
    "ǅ ǈ ⅷ ½ ² ٣ ৪ 𝟘 𐍈 \U0001f9ff \U000e0041 \U0010ffff "
    "\x01\x7f", "<s>[INST]<SPECIAL_12>[/INST]</s><SPECIAL_11>x",
    "<think>\n", "</think>\n\n", " </think>", "  two  spaces   three", "1234567", "line\n\n\nline",
    "…—“”/\n/", "\ud7ff\ue000",
]  # fmt: skip
CUT_DIFFERENTLY = ["हिन्दी", "مُحَمَّد"]  # its rule counts no combining mark as a letter, tekken's does


def opened(path, **settings):
    return llama_cpp.Llama(str(path), n_threads=1, n_threads_batch=1, verbose=False, seed=0, **settings)


@pytest.fixture
def export(tmp_path):
    def write(directory, kind):
        with GgufExport(directory, kind) as export:
            export.write(tmp_path / f"{kind}.gguf")
        return tmp_path / f"{kind}.gguf"

    return write


@pytest.mark.parametrize("name", CONFIGS, ids=lambda name: name.replace(" ", "-"))
def test_llama_cpp_logits_equal_ours_in_prefill_and_decode(checkpoint, export, name):
    path = export(checkpoint(name), "f32")
    theirs = opened(path, n_ctx=256, logits_all=True, type_k=F32, type_v=F32, flash_attn=False)
    tokens_T = torch.randint(13, 350, (90,))
    begin = 0
    for end in (70, 71, 72, 90):  # a prompt, two steps of one token, and a prompt that goes on
        theirs.eval(tokens_T[begin:end].tolist())
        begin = end
    logits_TV = load(checkpoint(name))(tokens_T[None])[0]
    assert logits_TV.std() > 0.5
    tolerance = 2e-4 if "yarn" in name else 5e-5  # both multiply cos and sin, rounded in another order
    np.testing.assert_allclose(theirs.scores[:90], logits_TV.detach().numpy(), atol=tolerance)


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_llama_cpp_logits_of_the_real_model_that_came_as_gguf_and_goes_back(tmp_path, kind):
    source = smollm2()
    with GgufExport(source, kind) as export:
        export.write(tmp_path / "back.gguf")
    texts = ["The capital of France is", "def fibonacci(n):\n    if n < 2:\n        return n\n"]
    came, goes = (opened(path, n_ctx=128, logits_all=True) for path in (source, tmp_path / "back.gguf"))
    for text in texts:
        assert came.tokenize(text.encode()) == goes.tokenize(text.encode())
        ids = came.tokenize(text.encode())
        for one in (came, goes):
            one.reset()
            one.eval(ids)
        want, got = (torch.tensor(one.scores[: len(ids)]).log_softmax(-1) for one in (came, goes))
        divergence = (want.exp() * (want - got)).sum(-1).mean()
        assert divergence < 0.03  # the file that came multiplies by activations in 8 bits


def lesson(tokenizer):
    """A conversation, and what is to be said in it."""
    template, messages = ChatTemplate.default(), [{"role": "user", "content": "quick?"}]
    return template.training_pair(
        tokenizer, messages, "The fox counts 12 + 30 = 42.", "It's the quick brown fox's 東京, isn't it?"
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory, small):
    """A hybrid that knows one conversation by heart."""
    config = HybridConfig(**{**HYBRID, "initializer_range": 0.05})
    model = HybridLM(config, seed=2)
    ids = torch.tensor(lesson(small).ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(300):
        loss = F.cross_entropy(model(ids[None, :-1])[0], ids[1:])
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    directory = tmp_path_factory.mktemp("trained") / "model"
    save(model, directory)
    small.save(directory)
    ChatTemplate.default().save(directory)
    return directory


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_llama_cpp_generates_the_same_text_in_every_type(trained, export, small, kind):
    ours = LLM(trained).chat([{"role": "user", "content": "quick?"}], SamplingParams(max_tokens=200))
    assert ours.text == small.decode(lesson(small).completion) and ours.finish_reason == "stop"
    answer = opened(export(trained, kind), n_ctx=512).create_chat_completion(
        [{"role": "user", "content": "quick?"}], temperature=0.0, max_tokens=200
    )
    assert answer["choices"][0]["message"]["content"] == ours.text
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("name", ["hybrid", "attention first and last", "dense, tied"])
def test_llama_cpp_greedy_text_of_random_models_equals_ours(checkpoint, export, name):
    prompt = "The quick brown fox counts"
    ours = LLM(checkpoint(name))
    ids = ours.tokenizer.encode(prompt)
    wanted = ours.generate([ids], SamplingParams(max_tokens=40, ignore_eos=True))[0].token_ids
    theirs = opened(export(checkpoint(name), "f32"), n_ctx=256, type_k=F32, type_v=F32)
    assert theirs.tokenize(prompt.encode(), add_bos=False, special=True) == ids
    found = []
    for number in theirs.generate(ids, temp=0.0):
        found.append(number)
        if len(found) == 40:
            break
    assert found == list(wanted)


@pytest.fixture(scope="session", params=["small", "tekken", "bytes"])
def speaker(request, tmp_path_factory, small):
    """A tokenizer of ours, and llama.cpp's from the export of a model with it."""
    make = {"small": lambda: small, "tekken": official, "bytes": lambda: train_bpe(["ab"], 269)}
    tokenizer = make[request.param]()
    directory = tmp_path_factory.mktemp("speaker") / "model"
    save(
        random_model(HybridConfig(**{**HYBRID, "vocab_size": tokenizer.vocab_size, "hidden_size": 32})),
        directory,
    )
    tokenizer.save(directory)
    with GgufExport(directory, "q8_0") as export:
        export.write(directory / "model.gguf")
    return Tokenizer.from_directory(directory), opened(directory / "model.gguf", vocab_only=True)


def official():
    pytest.importorskip(
        "mistral_common", reason="the file that tekken is rebuilt from comes with mistral-common"
    )
    return tekken()


@pytest.mark.parametrize("special", [True, False])
def test_llama_cpp_ids_of_hard_texts_equal_ours(speaker, special):
    ours, theirs = speaker
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=False, special=special) == ours.encode(
            text, parse_special=special
        ), text


def test_llama_cpp_decodes_texts_that_it_splits_differently(speaker):
    ours, theirs = speaker
    for text in CUT_DIFFERENTLY:
        assert ours.decode(theirs.tokenize(text.encode(), add_bos=False)) == text


def test_llama_cpp_has_the_bos_and_eos_of_the_checkpoint(speaker):
    ours, theirs = speaker
    assert (theirs.token_bos(), theirs.token_eos()) == (ours.bos_id, ours.eos_id)
    assert theirs.tokenize(b"a") == ours.encode("a")  # add_bos_token is false in what we save
    vocab = theirs._model.vocab
    ends = {number for number in range(20) if llama_cpp.llama_vocab_is_eog(vocab, number)}
    assert ends == set(ours.stop_ids)


def test_llama_cpp_chat_prompt_equals_ours(speaker):
    ours, theirs = speaker
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        theirs.metadata["tokenizer.chat_template"], eos_token="<SPECIAL_12>", bos_token="<s>"
    )
    for messages in MESSAGES:
        prompt = formatter(messages=messages).prompt
        assert prompt == ChatTemplate.default().render(messages)
        ids = theirs.tokenize(prompt.encode(), add_bos=False, special=True)
        assert ids == ChatTemplate.default().encode(ours, messages)
