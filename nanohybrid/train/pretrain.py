"""Pretraining: token stores in, a base model out (paper, section 2).

The recipe holds the model, the number of tokens, the phases of the mixture, optimizer, schedule and
precision. The output is a checkpoint in the Hugging Face layout, with the tokenizer of the data and a report.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanohybrid.checkpoint import save
from nanohybrid.config import HybridConfig
from nanohybrid.data import Loader, Mixture, Phase, TokenStore
from nanohybrid.data.corpus import Corpus
from nanohybrid.errors import ConfigError
from nanohybrid.estimate.training import TrainingMemory
from nanohybrid.estimate.units import GIB
from nanohybrid.model import HybridLM
from nanohybrid.presets import preset
from nanohybrid.stages import Stage, open_stage
from nanohybrid.stages.lineage import machine_memory_bytes
from nanohybrid.text import Tokenizer
from nanohybrid.train import training_state
from nanohybrid.train.loop import LoopConfig, fit
from nanohybrid.train.next_token import mean_loss, next_token_loss
from nanohybrid.train.optimizer import OptimizerConfig
from nanohybrid.train.precision import PrecisionConfig
from nanohybrid.train.schedule import ScheduleConfig


@dataclass(frozen=True)
class PretrainRecipe:
    """Pretraining."""

    model: str | dict[str, Any] = "tiny"
    """The name of a preset, or a table of model configuration fields.

    The vocabulary size is the tokenizer's.
    """
    tokens: int = 2_000_000
    """Tokens to train on, rounded up to whole steps."""
    steps: int | None = None
    """Number of steps, instead of `tokens`."""
    batch_tokens: int = 2048
    """Tokens of a batch."""
    sequence_length: int = 256
    """Longest sequence, in tokens; longer documents are split."""
    phases: tuple[Phase, ...] = ()
    """Phases of the data mixture; empty for those of the data directory."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    validation_batches: int = 8
    """Batches of held-out documents for the validation loss; 0 skips it."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.batch_tokens < 1 or self.sequence_length < 1:
            raise ConfigError("tokens (or steps), batch_tokens and sequence_length must be positive")
        if self.validation_batches < 0:
            raise ConfigError(
                f"validation_batches is {self.validation_batches}: it must not be negative; 0 skips "
                "validation"
            )

    @property
    def total_steps(self) -> int:
        """Number of steps of the run."""
        return self.steps if self.steps is not None else -(-self.tokens // max(self.batch_tokens, 1))


def pretrain(recipe: PretrainRecipe, data: Path, out: Path, device: str = "cpu") -> Path:
    """Train a model on the token stores of the directory `data` and write it to `out`, which is returned.

    An interrupted run resumes; a complete one returns at once. `device` is not part of the run's identity: a
    run may resume on another one. Raises ConfigError or InputError for a recipe, data or a directory that
    cannot be used.
    """
    with open_stage(out, "pretrain", recipe, {"data": data}, recipe.seed, device) as stage:
        if stage.complete:
            return out
        corpus = Corpus.read(data)
        config = model_config(recipe.model, Tokenizer.from_directory(data))
        check_memory(config, recipe, device)
        with torch.device(device):
            model = HybridLM(config)
        model.reset_parameters(recipe.seed)
        mixture = Mixture(recipe.phases) if recipe.phases else corpus.mixture
        loader = Loader(
            corpus.stores,
            mixture,
            recipe.batch_tokens,
            recipe.sequence_length,
            recipe.seed,
            recipe.total_steps,
        )
        state = fit(
            model,
            loader.batch,
            next_token_loss,
            recipe,
            steps=recipe.total_steps,
            stage=stage,
            name="pretrain",
        )
        stage.measure(final_loss=state.loss_ema)
        measure(stage, model, recipe, corpus.validation)
        save(model, stage.directory, assets=data)
        training_state.remove(stage.directory)
    return out


def model_config(model: str | dict[str, Any], tokenizer: Tokenizer) -> HybridConfig:
    """The model configuration of a recipe, with the vocabulary size and special tokens of the tokenizer.

    Raises ConfigError for an unknown preset or field.
    """
    special_ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    vocabulary: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, **special_ids}
    if isinstance(model, str):
        return preset(model).replace(**vocabulary)
    try:
        return HybridConfig(**{**model, **vocabulary})
    except TypeError as error:
        raise ConfigError(f"model: {error}; its keys are the fields of a model configuration") from None


def check_memory(config: HybridConfig, recipe: PretrainRecipe, device: str = "cpu") -> None:
    """Raise ConfigError where a training step needs more memory than the device has."""
    mode = "fp32" if recipe.precision.mode == "fp32" else "bf16"
    needed = TrainingMemory.of(config, recipe.batch_tokens, mode, recipe.loop.activation_checkpoint_every)
    fixed, available = needed.weight_bytes + needed.gradient_bytes + needed.moment_bytes, memory_of(device)
    if needed.peak_bytes <= available:
        return
    where = "this machine" if device == "cpu" else device
    fix = (
        "choose a smaller model"
        if fixed > available
        else "lower batch_tokens, or set loop.activation_checkpoint_every to 1"
    )
    raise ConfigError(
        f"model: training takes {fixed / GIB:,.0f} GiB for weights, gradients and optimizer states, and "
        f"{needed.peak_bytes / GIB:,.0f} GiB with the activations of a step; {where} has "
        f"{available / GIB:,.0f} GiB: {fix}"
    )


def memory_of(device: str) -> int:
    """Total memory of a device in bytes, used or not."""
    return (
        torch.cuda.get_device_properties(device).total_memory
        if device.startswith("cuda")
        else machine_memory_bytes()
    )


def measure(stage: Stage, model: HybridLM, recipe: PretrainRecipe, held_out: dict[str, TokenStore]) -> None:
    """Record the number of parameters, the median speed, and the loss on held-out documents where there are
    any."""
    rows = stage.series("pretrain")
    stage.measure(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens_per_second=sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2],
    )
    if held_out and recipe.validation_batches:
        weights = {name: float(store.token_count) for name, store in held_out.items()}
        loader = Loader(
            held_out,
            [(1.0, weights)],
            recipe.batch_tokens,
            recipe.sequence_length,
            0,
            recipe.validation_batches,
        )
        stage.measure(validation_loss=mean_loss(model, map(loader.batch, range(recipe.validation_batches))))
