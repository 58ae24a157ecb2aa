"""The rebuilt tekken against the tokenizer of mistral-common, and against known ids."""

import json
import random
import sysconfig
from pathlib import Path

import pytest

from nanohybrid.errors import InputError
from nanohybrid.text import Tokenizer, tekken

KNOWN = {
    "<think>": [49250, 2077, 1062],
    "</think>": [1885, 74045, 1062],
    "<think>\n": [49250, 2077, 1561],
    "</think>\n\n": [1885, 74045, 3318],
    "</think>\n": [1885, 74045, 1561],
    " </think>": [2259, 74045, 1062],
}
WRITTEN = [
    "",
    " ",
    "\n\n\r\n \t x\n",
    "fn main() { let x: Vec<u8> = vec![0x1F; 1_000]; }  // 3.14159e-10",
    "price: $1,234.56 (−7 %) “quoted” don't DON'T iPhone HTTPServer",
    "東京は日本の首都です。人口は約1400万人。 한국어 문장입니다. 中文分词测试，没有空格。",
    "مرحبا بالعالم، هذه جملة طويلة. שלום עולם. नमस्ते दुनिया ภาษาไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 e\u0301 \u200b\ufeff \u00a0x",
    "ǅ ǈ ⅷ ½ ² ٣ ৪ 𝟘 𐍈 \U0001f9ff \U000e0041 \U0010ffff \x00\x01\x7f",
    "<s>[INST]<SPECIAL_12>[/INST]</s>",
]


@pytest.fixture(scope="module")
def theirs():
    module = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    return module.Tekkenizer.from_file(Path(module.__file__).parents[2] / "data" / "tekken_240718.json")


def code() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return [
        (library / name).read_text(encoding="utf-8")
        for name in ("textwrap.py", "bisect.py", "keyword.py", "this.py")
    ]


def random_unicode(count: int, length: int) -> list[str]:
    draw = random.Random(7)
    blocks = [
        (0x20, 0x7F),
        (0x80, 0x600),
        (0x600, 0xD800),
        (0xE000, 0x11000),
        (0x1F000, 0x1FB00),
        (0x20000, 0x110000),
    ]
    return ["".join(chr(draw.randrange(*draw.choice(blocks))) for _ in range(length)) for _ in range(count)]


def test_tekken_ids_equal_those_of_mistral_common(official, theirs):
    texts = [*WRITTEN, *code(), *random_unicode(60, 60)]
    different = [
        text
        for text, ids in zip(texts, official.encode_batch(texts, parse_special=False), strict=True)
        if ids != theirs.encode(text, bos=False, eos=False)
    ]
    assert not different


def test_tekken_token_bytes_equal_those_of_mistral_common(official, theirs):
    assert official.vocab_size == theirs.n_words == 131_072
    assert all(
        official.token_bytes(number) == theirs.id_to_byte_piece(number) for number in range(1000, 131_072, 7)
    )


@pytest.mark.parametrize("text", KNOWN)
def test_tekken_gives_known_ids(official, text):
    assert official.encode(text) == KNOWN[text]


def test_tekken_special_tokens_have_the_released_names_and_ids(official):
    assert [
        official.id_of(token) for token in ("<unk>", "<s>", "</s>", "[INST]", "<SPECIAL_10>", "<SPECIAL_999>")
    ] == [0, 1, 2, 3, 10, 999]
    assert (official.bos_id, official.eos_id, official.pad_id, official.stop_ids) == (1, 12, 0, {2, 11, 12})


def test_tekken_gives_the_same_ids_after_saving_and_loading(official, tmp_path):
    official.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    text = "".join(WRITTEN)
    assert again.encode(text) == official.encode(text)
    assert again.stop_ids == official.stop_ids


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        ("{", "not a tekken file"),
        ("{}", "not a tekken file"),
        ('{"config": {}, "vocab": []}', "not a tekken file"),
    ],
)
def test_tekken_names_a_file_of_another_format(tmp_path, content, says):
    file = tmp_path / "tekken.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=says) as caught:
        tekken(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tekken_refuses_a_truncated_file(tmp_path):
    config = {"pattern": ".", "default_vocab_size": 1300, "default_num_special_tokens": 1000}
    file = tmp_path / "tekken.json"
    file.write_text(json.dumps({"config": config, "vocab": [{"rank": 0, "token_bytes": "AA=="}]}))
    with pytest.raises(InputError, match="has 1 tokens"):
        tekken(file)
