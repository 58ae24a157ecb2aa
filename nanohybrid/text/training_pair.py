"""A prompt and its completion as ids, in parts that can have different loss masks."""

from dataclasses import dataclass

from nanohybrid.text.tokenizer import EOS, Tokenizer

THINK_END = "</think>\n\n"


@dataclass(frozen=True)
class TrainingPair:
    """The ids of a prompt and its completion, part by part. `ids` has all of them in order.

    prompt       the rendered conversation up to the generation prompt, with thinking opened or closed
    reasoning    the trace and its final newline; empty without thinking or where a trace was cut to nothing
    think_close  `</think>` and an empty line; empty without thinking
    answer       the answer and a newline
    end          EOS; a loss can end with it
    tail         the newline that follows in a conversation, for packing turns; no loss on it
    """

    prompt: list[int]
    reasoning: list[int]
    think_close: list[int]
    answer: list[int]
    end: list[int]
    tail: list[int]

    @classmethod
    def encode(
        cls, tokenizer: Tokenizer, prompt: list[int], reasoning: str | None, answer: str
    ) -> "TrainingPair":
        """Encode each part separately. Special tokens in reasoning or answer are encoded as plain text."""

        def plain(text: str) -> list[int]:
            return tokenizer.encode(text, parse_special=False) if text else []

        trace = f"{reasoning}\n" if reasoning else ""
        think_close = THINK_END if reasoning is not None else ""
        return cls(
            prompt, plain(trace), plain(think_close), plain(f"{answer}\n"), [tokenizer.eos_id], plain("\n")
        )

    @property
    def completion(self) -> list[int]:
        """The ids that the model should generate: with EOS, without the tail."""
        return [*self.reasoning, *self.think_close, *self.answer, *self.end]

    @property
    def ids(self) -> list[int]:
        """All ids, from prompt to tail."""
        return [*self.prompt, *self.completion, *self.tail]


def completion_text(reasoning: str | None, answer: str) -> str:
    """The completion as text, with its tail."""
    trace = f"{reasoning}\n" if reasoning else ""
    return f"{trace}{THINK_END if reasoning is not None else ''}{answer}\n{EOS}\n"
