"""Text to ids and back: tokenizers, and the chat format with its thinking and tool marks."""

from nanohybrid.text.stream import TextStream
from nanohybrid.text.tekken import tekken
from nanohybrid.text.tokenizer import Tokenizer
from nanohybrid.text.training import train_bpe

__all__ = ["TextStream", "Tokenizer", "tekken", "train_bpe"]
