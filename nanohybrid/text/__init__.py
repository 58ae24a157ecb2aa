"""Text: tokenizers, and the chat template with its tags for thinking and tool calls."""

from nanohybrid.text.chat import THINK_CLOSE, THINK_OPEN, ChatTemplate, split_thinking
from nanohybrid.text.stream import TextStream
from nanohybrid.text.tekken import tekken
from nanohybrid.text.tokenizer import Tokenizer
from nanohybrid.text.training import train_bpe
from nanohybrid.text.training_pair import TrainingPair, completion_text

__all__ = [
    "THINK_CLOSE",
    "THINK_OPEN",
    "ChatTemplate",
    "TextStream",
    "Tokenizer",
    "TrainingPair",
    "completion_text",
    "split_thinking",
    "tekken",
    "train_bpe",
]
