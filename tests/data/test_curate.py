"""Filters: each drops its examples, passes ordinary text, and counts what it dropped."""

import pytest

from nanohybrid import tasks
from nanohybrid.data.curate import Curator, Decontaminator, QualityLimits
from nanohybrid.data.curate.duplicates import ExactDuplicates, NearDuplicates
from nanohybrid.data.curate.quality import HEURISTICS, failed_heuristic
from nanohybrid.data.documents import Document, TextSpan, plain, sections, up_to

PROSE = (
    "A tokenizer cuts text into pieces and gives each of them a number.\nWhat it learned from is what it can "
    "say in few of them.\n"
    "Digits stay single, since a model that adds must see every one.\n"
)
CODE = (
    "def area(width: float, height: float) -> float:\n"
    '    """The area of a rectangle of the given sides."""\n'
    "    return width * height\n"
)

FAULTY = {
    "too short": "Only this.",
    "long lines": PROSE + "and on " * 100,
    "broken characters": PROSE + "caf\ufffd",
    "too many symbols": "{}[]();:=+-" * 20 + PROSE,
    "too few letters": PROSE[:60] + "\n" + "1 = 2; 3 = 4; " * 12,
    "too many digits": PROSE + "31415926535 8979323846 2643383279",
    "repeated lines": PROSE + "the same line again\n" * 6,
    "license": PROSE + "Permission is hereby granted, free of charge, to any person",
}


@pytest.mark.parametrize("name", HEURISTICS)
def test_quality_heuristic_fails_its_example(name: str) -> None:
    assert HEURISTICS[name](FAULTY[name], QualityLimits())


@pytest.mark.parametrize("text", [PROSE, CODE])
def test_quality_heuristics_pass_ordinary_text_and_code(text: str) -> None:
    assert failed_heuristic(text, QualityLimits()) is None


def test_exact_duplicates_ignores_white_space() -> None:
    seen = ExactDuplicates()
    assert [seen.add(text) for text in ("a b", "a  b\n", "a c", "a b")] == [False, True, False, True]


def test_near_duplicates_compares_shingles_of_words() -> None:
    pytest.importorskip("rensa")
    words = [f"word{number}" for number in range(200)]
    seen = NearDuplicates(0.8)
    assert not seen.add(" ".join(words))
    assert seen.add(" ".join([*words, "and", "more"]))
    assert not seen.add(" ".join(words[::2]))
    assert not seen.add("a text of its own that shares nothing with the others")


def test_decontaminator_finds_prompts_as_lines_and_as_13_grams() -> None:
    long = "how many legs do three cats and two birds have in all if none is lame"
    is_contaminated = Decontaminator(["sum 12+3+4", long]).is_contaminated
    assert is_contaminated("some text\nsum 12 + 3 + 4\nmore") and is_contaminated(
        f"He asked: {long.upper()}?"
    )
    assert (
        not is_contaminated("the sum 12+3+4 within a line")
        and not is_contaminated("how many legs do three cats have")
        and not is_contaminated("")
    )


def test_curator_counts_documents_by_store_and_reason() -> None:
    curator = Curator(QualityLimits(), 0, Decontaminator([PROSE]))
    documents = [plain("code", CODE), plain("code", CODE), plain("code", "x"), plain("prose", PROSE)]
    assert list(curator.texts(documents)) == documents[:1]
    assert curator.counts == {
        "code": {"kept": 1, "exact duplicate": 1, "too short": 1},
        "prose": {"evaluation prompt": 1},
    }


def test_curator_drops_problems_of_the_test_split() -> None:
    prompts = [f"run {a}+{b}" for a in range(10) for b in range(10)]
    curator = Curator(QualityLimits(), 0, Decontaminator())
    documents = [
        Document("tasks-running", (TextSpan(prompt + "\n", loss=False), TextSpan("1\n")))
        for prompt in [*prompts, prompts[0]]
    ]
    passed = {document.spans[0].text.strip() for document in curator.problems(documents)}
    assert passed == {prompt for prompt in prompts if tasks.split_of(prompt) == "train"}
    assert curator.counts["tasks-running"]["test split"] + len(passed) + 1 == len(documents)


def test_sections_lose_no_text_and_stay_near_their_size() -> None:
    text = "".join(f"line {number} of a text\n" + "\n" * (number % 5 == 0) for number in range(200))
    parts = [document.text for document in sections("prose", text, 300)]
    assert "".join(parts).split() == text.split()
    assert len(parts) > 5 and all(len(part) <= 620 for part in parts)


def test_up_to_stops_at_its_size() -> None:
    documents = [plain("prose", "x" * 1000)] * 10
    assert len(list(up_to(documents, 0.0025))) == 3 and list(up_to(documents, 0)) == []
