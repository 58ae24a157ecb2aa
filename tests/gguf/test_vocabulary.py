"""Tokenizers from metadata: the ids are those of the tokenizer that it was made from, and llama.cpp's."""

import json
import random

import pytest
from gguf_models import SAMPLE
from real_model import smollm2, smollm2_directory
from tokenizers import Tokenizer as RawTokenizer

from nanohybrid.errors import CheckpointError
from nanohybrid.gguf import open_gguf
from nanohybrid.gguf.splitting import RULES, rule_names
from nanohybrid.gguf.texts import has_text, read_text
from nanohybrid.gguf.vocabulary import stop_ids, tokenizer_config, tokenizer_json
from nanohybrid.text import ChatTemplate, Tokenizer, train_bpe

from . import build

MISSING = "llama-cpp-python is not installed: a benchmark's dependency, built from source"
TEXTS = [
    "", " ", "\n\n\r\n \t x\n", "fn main() { let x: Vec<u8> = vec![0x1F; 1_000]; }  // 3.14159e-10",
    "price: $1,234.56 (−7 %) “quoted” don't DON'T iPhone HTTPServer aB I'LL we'Ve",
    "École ÉCOLE éCOLE Größe STRASSE ПриветМир ПРИВЕТ हिन्दी مُحَمَّد",
    "東京は日本の首都です。人口は約1400万人。 한국어 문장입니다. 中文分词测试，没有空格。 שלום עולם",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 e\u0301 \u200b\ufeff \u00a0x \u2028 \u0085y", "a" * 300,
    "\x00\x00\x00", "1234567 12 345",
    "ǅ ǈ ⅷ ½ ² ٣ ৪ 𝟘 𐍈 \U0001f9ff \U000e0041 \U0010ffff \x01\x7f", "  two  spaces   three",
    "line\n\n\nline   \n  x",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>", "…—“”/\n/", "\ud7ff\ue000",
    "\t\tif (x):\n\t\t\treturn x\n",
]  # fmt: skip


def noise(seed, length=400):
    """Random characters of several alphabets, with much white space and punctuation."""
    generator = random.Random(seed)
    ranges = (
        (32, 127),
        (32, 48),
        (9, 14),
        (0xA0, 0x250),
        (0x370, 0x500),
        (0x4E00, 0x4F00),
        (0x1F600, 0x1F640),
    )
    return "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(length))


SIZES = [
    build.pair("general.architecture", "str", "llama"),
    *(
        build.pair(f"llama.{key}", "u32", value)
        for key, value in {
            "context_length": 64, "embedding_length": 1, "block_count": 1, "feed_forward_length": 1,
            "attention.head_count": 1,
        }.items()
    ),
    build.pair("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5),
]  # fmt: skip


def vocabulary_file(tmp_path, rule="gpt-2", types=None, tokens=None, merges=None, more=(), embeddings=400):
    """A file with the tokenizer of train_bpe under any rule, and embeddings for its ids."""
    raw = json.loads(train_bpe([SAMPLE] * 4, 350)._raw.to_str())
    vocab = raw["model"]["vocab"]
    tokens = tokens or sorted(vocab, key=vocab.__getitem__)
    merges = [" ".join(pair) for pair in raw["model"]["merges"]] if merges is None else merges
    types = types or [3] * 13 + [1] * (len(tokens) - 13)
    pairs = [
        *SIZES, build.pair("tokenizer.ggml.model", "str", "gpt2"),
        build.pair("tokenizer.ggml.tokens", "strings", tokens),
        build.pair("tokenizer.ggml.merges", "strings", merges),
        build.pair("tokenizer.ggml.token_type", "i32s", types),
        build.pair("tokenizer.ggml.bos_token_id", "u32", 1),
        build.pair("tokenizer.ggml.eos_token_id", "u32", 12), *more,
    ]  # fmt: skip
    if rule is not None:
        pairs.append(build.pair("tokenizer.ggml.pre", "str", rule))
    path = tmp_path / "v.gguf"
    path.write_bytes(
        build.whole(pairs, [build.info("token_embd.weight", (1, embeddings))], b"\0" * 4 * embeddings)
    )
    return path


def raw_tokenizer(path):
    return RawTokenizer.from_str(json.dumps(tokenizer_json(open_gguf(path))))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_makes_a_tokenizer_that_loses_nothing(tmp_path, rule):
    tokenizer = Tokenizer.from_directory(vocabulary_file(tmp_path, rule), 400)
    for text in [*TEXTS, noise(1)]:
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


def test_texts_are_split_as_the_rules_say(tmp_path):
    """Parts of a text that shows the differences between the rules."""
    text = "I'M 12345 don't\n\n x÷y"
    parts = {}
    for rule in (*rule_names(), None):
        splitter = raw_tokenizer(vocabulary_file(tmp_path, rule)).pre_tokenizer
        raw = [part for part, _ in splitter.pre_tokenize_str(text)]
        parts[rule] = " ".join(part.replace("Ġ", "_").replace("Ċ", "/") for part in raw)
    assert parts == {
        "tekken": "I 'M _ 1 2 3 4 5 _don 't // _x Ã·y",
        "qwen2": "I 'M _ 1 2 3 4 5 _don 't // _x Ã·y",
        "llama-bpe": "I 'M _ 123 45 _don 't // _x Ã·y",
        "smaug-bpe": "I 'M _ 123 45 _don 't // _x Ã·y",
        "smollm": "I ' M _ 1 2 3 4 5 _don 't // _x Ã· y",
        "gpt-2": "I ' M _12345 _don 't // _x Ã· y",
        "deepseek-v3": parts["deepseek-v3"],
        "default": "I ' M _ 123 45 _don ' t // _x Ã· y",
        None: "I ' M _ 123 45 _don ' t // _x Ã· y",
    }


def test_control_tokens_are_special_and_user_defined_ones_are_words(tmp_path):
    types = [3] * 13 + [1] * 337
    types[12], types[11] = 4, 5
    path = vocabulary_file(tmp_path, types=types)
    tokenizer = Tokenizer.from_directory(path, 400)
    assert set(tokenizer.special_tokens) == set(range(11)) and tokenizer.id_of("<SPECIAL_11>") is None
    assert tokenizer.encode("<SPECIAL_12>", parse_special=False) == [12]
    assert 11 not in tokenizer.encode("<SPECIAL_11>") and tokenizer.encode("<s>", parse_special=False) != [1]


def test_ends_of_answers_are_those_of_the_keys_and_those_known_by_name(tmp_path):
    more = [
        build.pair("tokenizer.ggml.eot_token_id", "u32", 3),
        build.pair("tokenizer.ggml.eom_token_id", "u32", 999),
    ]
    raw = json.loads(train_bpe([SAMPLE] * 4, 350)._raw.to_str())["model"]["vocab"]
    tokens = sorted(raw, key=raw.__getitem__)
    tokens[5] = "<|im_end|>"
    file = open_gguf(vocabulary_file(tmp_path, tokens=tokens, more=more))
    assert stop_ids(file) == [12, 3, 5]
    assert json.loads(read_text(file.path / "generation_config.json", 1000)) == {
        "bos_token_id": 1, "eos_token_id": [12, 3, 5],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "rule", "adds"),
    [(None, "tekken", True), (None, "qwen2", False), (False, "tekken", False), (True, "qwen2", True)],
)
def test_bos_is_added_as_the_file_says_or_as_the_rule_does(tmp_path, said, rule, adds):
    more = [] if said is None else [build.pair("tokenizer.ggml.add_bos_token", "bool", said)]
    path = vocabulary_file(tmp_path, rule, more=more)
    assert tokenizer_config(open_gguf(path))["add_bos_token"] is adds
    assert (raw_tokenizer(path).encode("x").ids[0] == 1) is adds


def test_templates_by_name_are_all_there(tmp_path):
    more = [
        build.pair("tokenizer.chat_template", "str", "plain {{ messages[0].content }}"),
        build.pair(
            "tokenizer.chat_template.tool_use", "str", "{{ tools|length }} tools {{ messages[0].content }}"
        ),
        build.pair("tokenizer.chat_templates", "strings", ["tool_use"]),
    ]
    path = vocabulary_file(tmp_path, more=more)
    template, messages = ChatTemplate.from_directory(path), [{"role": "user", "content": "x"}]
    assert template.render(messages) == "plain x"
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    assert template.render(messages, tools=[tool]) == "1 tools x"
    path = vocabulary_file(tmp_path, more=more[:1])
    assert has_text(path / "chat_template.jinja") and ChatTemplate.from_directory(path).source.startswith(
        "plain"
    )
    assert not has_text(vocabulary_file(tmp_path) / "chat_template.jinja")


REFUSED = {
    "an unknown rule": (dict(rule="nonsense"), "pre is .?nonsense.?, an unknown splitting rule"),
    "too few types": (dict(types=[1]), "has 350 tokens and 1 types of tokens"),
    "a token twice": (
        dict(tokens=["a", "b", "a"], types=[1, 1, 1], merges=["a b"]), "the token .?a.? has the ids 0 and 2",
    ),
    "a merge of three": (dict(merges=["a b c"]), "merges: entry 0 is not two tokens"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_tables_that_do_not_fit_are_refused(tmp_path, what):
    settings, match = REFUSED[what]
    with pytest.raises(CheckpointError, match=match) as caught:
        Tokenizer.from_directory(vocabulary_file(tmp_path, **settings), 400)
    assert "\n" not in str(caught.value) and "v.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "called"), [("llama", "SentencePiece"), ("bert", "WordPiece"), ("t5", "t5")]
)
def test_other_tokenizers_are_refused_by_name(tmp_path, model, called):
    pairs = [*SIZES, build.pair("tokenizer.ggml.model", "str", model)]
    path = tmp_path / "x.gguf"
    path.write_bytes(build.whole(pairs, [build.info("token_embd.weight", (1, 4))], b"\0" * 16))
    with pytest.raises(CheckpointError, match=f"its tokenizer is .?{called}.*only byte-level BPE"):
        Tokenizer.from_directory(path, 4)


def test_a_file_without_a_tokenizer_says_so(tmp_path):
    path = tmp_path / "x.gguf"
    pairs = [*SIZES, build.pair("tokenizer.ggml.model", "str", "none")]
    path.write_bytes(build.whole(pairs, [build.info("token_embd.weight", (1, 4))], b"\0" * 16))
    with pytest.raises(CheckpointError, match=r"x\.gguf: has no tokenizer"):
        Tokenizer.from_directory(path, 4)


def test_more_tokens_than_embeddings_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has ids up to 349, but the model's vocabulary ends at 299"):
        Tokenizer.from_directory(vocabulary_file(tmp_path, embeddings=300), 300)


def test_ids_of_the_real_model_are_those_of_its_hugging_face_tokenizer():
    ours, theirs = Tokenizer.from_directory(smollm2()), Tokenizer.from_directory(smollm2_directory())
    for text in [*TEXTS, *(noise(seed) for seed in range(50))]:
        for special in (True, False):
            assert ours.encode(text, parse_special=special) == theirs.encode(text, parse_special=special), (
                text
            )
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (1, 2, {0, 2})


def test_ids_of_the_real_model_are_llama_cpps():
    llama_cpp = pytest.importorskip("llama_cpp", reason=MISSING)
    ours, theirs = (
        Tokenizer.from_directory(smollm2()),
        llama_cpp.Llama(str(smollm2()), vocab_only=True, verbose=False),
    )
    for text in [*TEXTS, *(noise(seed) for seed in range(50))]:
        for special in (True, False):
            wanted = theirs.tokenize(text.encode(), add_bos=False, special=special)
            assert ours.encode(text, parse_special=special) == wanted, text
    ends = {number for number in range(200) if llama_cpp.llama_vocab_is_eog(theirs._model.vocab, number)}
    assert ends - {4} == ours.stop_ids  # <reponame>, by its name a token of fill-in-the-middle


@pytest.mark.parametrize("rule", rule_names())
def test_ids_under_every_rule_are_llama_cpps(tmp_path, rule):
    """On a small vocabulary, with many merges that a wrong split would show."""
    llama_cpp = pytest.importorskip("llama_cpp", reason=MISSING)
    path = vocabulary_file(tmp_path, rule, embeddings=350)
    ours, theirs = (
        Tokenizer.from_directory(path, 350),
        llama_cpp.Llama(str(path), vocab_only=True, verbose=False),
    )
    skipped = ("हिन्दी", "\u0301", "👩") if rule == "tekken" else ()
    for text in [*TEXTS, SAMPLE, *(noise(seed) for seed in range(20))]:
        if any(part in text for part in skipped):
            continue  # llama.cpp's form of this rule counts no combining character as a letter
        assert ours.encode(text, parse_special=False) == theirs.tokenize(
            text.encode(), add_bos=False, special=False
        ), text
