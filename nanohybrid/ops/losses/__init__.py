"""Losses on a language-model head without [tokens, vocabulary]: cross-entropy, log-probs, forward KL."""

from nanohybrid.ops.losses.cross_entropy import chunked_cross_entropy, chunked_log_probs, summed_cross_entropy
from nanohybrid.ops.losses.forward_kl import chunked_forward_kl, summed_forward_kl
from nanohybrid.ops.losses.reference import IGNORED
from nanohybrid.ops.losses.top_k_kl import TopK, summed_top_k_kl, top_k_of

__all__ = [
    "IGNORED",
    "TopK",
    "chunked_cross_entropy",
    "chunked_forward_kl",
    "chunked_log_probs",
    "summed_cross_entropy",
    "summed_forward_kl",
    "summed_top_k_kl",
    "top_k_of",
]
