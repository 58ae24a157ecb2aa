"""Chats for SFT: their text, and which tokens have a loss."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanohybrid.align.chats import ChatKind, ChatMaker, ChatShares, chats
from nanohybrid.align.truncate import truncate, truncate_randomly
from nanohybrid.errors import ConfigError
from nanohybrid.tasks import Problem

PROBLEM = Problem("running", 2, "run 1+2*3", "1+2=3\n3*3=9", "9")
HEAD = "<SPECIAL_10>System\n\n<SPECIAL_11>User\nrun 1+2*3\n<SPECIAL_11>Assistant\n"


def rendered(maker: ChatMaker, kind: ChatKind, seed: int = 0) -> tuple[str, str]:
    """The text of a chat, and the text with dots for the tokens that have no loss."""
    chat = maker.chat(PROBLEM, kind, random.Random(seed))
    assert len(chat.tokens) == len(chat.loss_mask)
    decode = maker.tokenizer.decode
    with_dots = "".join(
        decode([token], skip_special_tokens=False) if loss else "."
        for token, loss in zip(chat.tokens, chat.loss_mask, strict=True)
    )
    return decode(chat.tokens, skip_special_tokens=False), with_dots.strip(".")


def test_thinking_chat_has_loss_on_trace_think_close_answer_and_eos(maker: ChatMaker) -> None:
    whole, part = rendered(maker, "thinking")
    assert part == "1+2=3\n3*3=9\n</think>\n\n9\n<SPECIAL_12>" and whole == f"{HEAD}<think>\n{part}"


def test_direct_chat_has_loss_on_its_answer_only(maker: ChatMaker) -> None:
    whole, part = rendered(maker, "direct")
    assert part == "9\n<SPECIAL_12>" and whole == f"{HEAD}<think></think>{part}"


def test_truncated_chat_has_no_loss_on_think_close(maker: ChatMaker) -> None:
    found = {rendered(maker, "truncated", seed) for seed in range(20)}
    assert {whole.removeprefix(HEAD) for whole, _ in found} == {
        "<think>\n</think>\n\n9\n<SPECIAL_12>",
        "<think>\n1+2=3\n</think>\n\n9\n<SPECIAL_12>",
    }
    dots = {"".join(part.split(".")) for _, part in found}
    assert dots == {"9\n<SPECIAL_12>", "1+2=3\n9\n<SPECIAL_12>"}


def test_chat_starts_with_the_prompt_of_inference(maker: ChatMaker) -> None:
    for kind, thinking in (("thinking", True), ("direct", False)):
        prompt = maker.prompt(PROBLEM, thinking)
        assert maker.chat(PROBLEM, kind, random.Random(0)).tokens[: len(prompt)] == prompt


@given(st.lists(st.text("0123456789+=", min_size=1), min_size=1, max_size=8), st.integers())
def test_truncate_randomly_gives_a_prefix_of_whole_lines(lines: list[str], seed: int) -> None:
    trace = "\n".join(lines)
    cut = truncate_randomly(trace, random.Random(seed))
    assert cut == "" or (lines[: cut.count("\n") + 1] == cut.split("\n") and len(cut) < len(trace))
    assert truncate(trace, len(lines)) == trace and truncate(trace, 0) == ""


def test_chats_follow_their_shares_and_depend_on_the_seed_alone(maker: ChatMaker) -> None:
    rng = random.Random(0)
    counted = Counter(ChatShares(0.5, 0.25, 0.25, 0.0).draw(rng) for _ in range(2000))
    assert abs(counted["thinking"] - 1000) < 100 and abs(counted["direct"] - 500) < 80
    first, again, other = (
        list(chats(maker, ["sums", "running"], ChatShares(), 500, seed)) for seed in (1, 1, 2)
    )
    assert first == again != other and sum(len(chat.tokens) for chat in first) >= 500
    with pytest.raises(ConfigError, match="must not be negative"):
        ChatShares(thinking=-1)
