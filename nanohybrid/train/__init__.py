"""Training: one loop with mixed precision, learning-rate schedule, snapshots and activation checkpointing."""

from nanohybrid.train.loop import LoopConfig, fit
from nanohybrid.train.next_token import mean_loss, next_token_loss
from nanohybrid.train.optimizer import OptimizerConfig
from nanohybrid.train.precision import PrecisionConfig
from nanohybrid.train.pretrain import PretrainRecipe, pretrain
from nanohybrid.train.schedule import ScheduleConfig

__all__ = [
    "LoopConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "PretrainRecipe",
    "ScheduleConfig",
    "fit",
    "mean_loss",
    "next_token_loss",
    "pretrain",
]
