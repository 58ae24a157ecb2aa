"""GRPO: reinforcement learning from verifiable rewards, on completions the model samples itself.

A rollout of `prompts` x `group` completions is sampled by the engine, rewarded by the tasks' verifiers, compared within groups
(objective.py) and learnt in `updates` steps. With one update the ratio is 1 and the clip is idle; with more, old log-probabilities
are the engine's. The loop is the same `fit` as everywhere: a batch is a function of the weights and the step.

What is known to collapse (docs/align.md): no warm-up, a learning rate ten times this one, a task that is solved or hopeless.
"""

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.align.chats import ChatMaker
from nanohybrid.align.objective import advantages, policy_loss
from nanohybrid.align.rollouts import PolicyBatch, Rollout, Sampling, draw, pack, sample
from nanohybrid.checkpoint import load, save
from nanohybrid.errors import ConfigError
from nanohybrid.model import HybridLM
from nanohybrid.ops.losses import chunked_log_probs
from nanohybrid.stages import Stage, open_stage
from nanohybrid.text import Tokenizer
from nanohybrid.text.chat import ChatTemplate
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig, ScheduleConfig, fit, snapshot


@dataclass(frozen=True)
class GrpoRecipe:
    """How to improve an aligned model by verifiable rewards."""
