"""Alignment: chats that think within a budget, rewards that can be verified, and points between checkpoints."""

from nanohybrid.align.grpo import GrpoRecipe, grpo
from nanohybrid.align.merge import MergeRecipe, merge
from nanohybrid.align.sft import SftRecipe, sft

__all__ = ["GrpoRecipe", "MergeRecipe", "SftRecipe", "grpo", "merge", "sft"]
