"""Supervised fine-tuning: a base model in, a model that thinks and answers out (paper, section 3)."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanohybrid import tasks
from nanohybrid.align.chats import ChatMaker, ChatShares, chats
from nanohybrid.checkpoint import cast_as_stored, load, refuse_quantized, resolve, save
from nanohybrid.data import Loader, TokenStore
from nanohybrid.data.corpus import Corpus
from nanohybrid.data.store import STORES
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.stages import open_stage
from nanohybrid.text import ChatTemplate, Tokenizer
from nanohybrid.train import (
    LoopConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    fit,
    next_token_loss,
    training_state,
)

CHATS = "chats"
PROBLEMS = "tasks-"  # prefix of stores with problems; the chats are made from the same tasks


@dataclass(frozen=True)
class SftRecipe:
    """Supervised fine-tuning on chats."""

    tasks: tuple[str, ...] = tasks.DEFAULT_MIX
    """Families of problems for the chats."""
    shares: ChatShares = field(default_factory=ChatShares)
    tokens: int = 1_000_000
    """Tokens to train on; no chat is seen twice."""
    batch_tokens: int = 2048
    """Tokens of a batch."""
    sequence_length: int = 256
    """Longest sequence, in tokens; longer chats are split."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-3))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    seed: int = 0
    """Seed of the chats and of their order."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.batch_tokens, self.sequence_length) < 1 or not self.tasks:
            raise ConfigError(
                "tokens, batch_tokens and sequence_length must be positive, and tasks must name at least one "
                "family"
            )


def sft(recipe: SftRecipe, model: Path, out: Path, data: Path | None = None, device: str = "cpu") -> Path:
    """Fine-tune the checkpoint `model` and write it to `out`, which is returned; `data` is a data directory
    for `shares.text`.

    Raises InputError for a quantized checkpoint, and where there is a share of text but no data.
    """
    model = resolve(model)
    refuse_quantized(model)
    if recipe.shares.text > 0 and data is None:
        raise InputError(
            f"shares.text is {recipe.shares.text}, and there is no text: give --data DIR, or set "
            "--shares.text 0"
        )
    inputs = {"model": model} | ({"data": data} if data else {})
    with open_stage(out, "sft", recipe, inputs, recipe.seed, device) as stage:
        if stage.complete:
            return out
        network = load(model, torch.float32, device)
        made = chat_store(
            recipe, ChatMaker(Tokenizer.from_directory(model), ChatTemplate.from_directory(model))
        )
        loader = batches(recipe, made, data, network.config.vocab_size)
        # Distillation of a pruned model trains on the same chats.
        made.write(stage.directory / STORES / f"{CHATS}.safetensors")
        state = fit(
            network,
            loader.batch,
            next_token_loss,
            recipe,
            steps=loader.total_steps,
            stage=stage,
            name="sft",
        )
        stage.measure(final_loss=state.loss_ema)
        cast_as_stored(network, model)
        save(network, stage.directory, assets=model)
        training_state.remove(stage.directory)
    return out


def chat_store(recipe: SftRecipe, maker: ChatMaker) -> TokenStore:
    """The chats of a run: as many tokens as it trains on. They depend on the seed alone."""
    made = chats(
        maker,
        recipe.tasks,
        recipe.shares,
        round(recipe.tokens * (1 - text_share(recipe))) + recipe.batch_tokens,
        recipe.seed,
    )
    return TokenStore.from_documents((chat.tokens, chat.loss_mask) for chat in made)


def text_share(recipe: SftRecipe) -> float:
    """Share of tokens from pretraining documents, from 0 to 1."""
    return recipe.shares.text / (recipe.shares.text + recipe.shares.chats)


def batches(recipe: SftRecipe, made: TokenStore, data: Path | None, vocab_size: int) -> Loader:
    """A loader that mixes chats with the text of a data directory, by shares of tokens.

    Raises InputError where there is no text.
    """
    share = text_share(recipe) if data else 0.0
    stores = {CHATS: made}
    weights = {CHATS: 1 - share}
    if data and share:
        texts = {
            name: store for name, store in Corpus.read(data).stores.items() if not name.startswith(PROBLEMS)
        }
        if not texts:
            raise InputError(f"{data}: holds no text beside problems; set --shares.text 0")
        for name, store in texts.items():
            store.check_ids(vocab_size, f"{data}: {name}")
        total = sum(store.token_count for store in texts.values())
        stores |= texts
        weights |= {name: share * store.token_count / total for name, store in texts.items()}
    steps = -(-recipe.tokens // recipe.batch_tokens)
    return Loader(stores, [(1.0, weights)], recipe.batch_tokens, recipe.sequence_length, recipe.seed, steps)
