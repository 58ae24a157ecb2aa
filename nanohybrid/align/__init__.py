"""Alignment: SFT on chats with a thinking budget, GRPO on verifiable rewards, and merging of checkpoints
(paper, section 3)."""

from nanohybrid.align.grpo import GrpoRecipe, grpo
from nanohybrid.align.merge import MergeRecipe, merge
from nanohybrid.align.sft import SftRecipe, sft

__all__ = ["GrpoRecipe", "MergeRecipe", "SftRecipe", "grpo", "merge", "sft"]
