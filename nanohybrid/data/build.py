"""Sources -> quality -> exact and near duplicates -> tokenizer -> token stores, as one stage.

Natural text is held in memory while it is curated, since the tokenizer is trained on all of it; problems are generated and
tokenized as a stream.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeVar

from nanohybrid.data.corpus import VALIDATION, store_path, write_mixture
from nanohybrid.data.curate import Curator, Decontaminator
from nanohybrid.data.describe import StoreStats, describe, write_report
from nanohybrid.data.documents import Document, up_to
from nanohybrid.data.recipe import DataRecipe, TaskSource
from nanohybrid.data.sources import files, problems, python_install
from nanohybrid.data.store import TokenStore
from nanohybrid.data.tokenize import encode
from nanohybrid.errors import ConfigError
from nanohybrid.stages import Progress, Stage, open_stage, progress
from nanohybrid.text import Tokenizer, train_bpe
from nanohybrid.text.chat import ChatTemplate

T = TypeVar("T")

# What stands around every chat, without a problem in it. A small model whose chat tags are one or two tokens and not six thinks in
# shorter sequences. Repeated, so that their pairs outnumber those of any text.
CHAT_FRAME = ("System\n\n", "User\n", "Assistant\n", "<think>\n", "</think>\n\n", "<think></think>")
FRAME_REPEATS = 5000
BESIDE_TOKENIZER = ("chat_template.jinja", "tokenizer_config.json", "config.json", "generation_config.json")
"""The files of `--tokenizer` that are read too: the chat template, and the ids that end a text."""


def build(recipe: DataRecipe, out: Path) -> Path:
    """Build the corpus of a recipe in the directory `out`, and return it."""
    sources = [(source, source.resolved()) for source in recipe.tasks]
    inputs = {f"files.{index}": path for index, path in enumerate((*recipe.files, *recipe.evaluation))}
    if recipe.tokenizer is not None:
        inputs["tokenizer"] = recipe.tokenizer / "tokenizer.json"
        beside = [recipe.tokenizer / name for name in BESIDE_TOKENIZER]
        inputs |= {f"tokenizer.{path.name}": path for path in beside if path.is_file()}
    with open_stage(out, "data", recipe, inputs, recipe.seed) as stage:
        if not stage.complete:
            Builder(recipe, stage).run(sources)
    return out


@dataclass
class Builder:
    """One run of the stage: what it holds between its steps."""

    recipe: DataRecipe
    stage: Stage
    stats: dict[str, StoreStats] = field(default_factory=dict)

    def run(self, sources: list[tuple[TaskSource, tuple[int, ...]]]) -> None:
        recipe, directory = self.recipe, self.stage.directory
        prompts = [prompt for path in recipe.evaluation for prompt in files.texts(path)]
        curator = Curator(recipe.quality, recipe.near_duplicates, Decontaminator(prompts))
        # 1. natural text, curated
        texts = {name: list(documents) for name, documents in self.texts(curator).items()}
        mixture = recipe.mixture.among(
            [
                *(name for name, kept in texts.items() if kept),
                *(problems.store_of(s.name) for s, _ in sources),
            ]
        )
        # 2. the tokenizer, from natural text and what frames a chat: digits and signs of the problems then stay single tokens
        natural = (document.text for documents in texts.values() for document in documents)
        tokenizer = self.tokenizer(chain(natural, CHAT_FRAME * FRAME_REPEATS))
        tokenizer.save(directory)
        template = (
            ChatTemplate.default()
            if recipe.tokenizer is None
            else ChatTemplate.from_directory(recipe.tokenizer)
        )
        template.save(directory)
        # 3. the stores
        total = sum(map(len, texts.values())) + sum(source.count for source, _ in sources)
        with progress("data", total, unit="doc") as bar:
            for name, documents in texts.items():
                self.write_texts(name, counted(documents, bar), tokenizer)
            for source, difficulties in sources:
                self.write_problems(source, difficulties, tokenizer, curator, bar)
        # 4. the account
        write_mixture(directory, mixture)
        measures = describe(self.stats, curator.counts, tokenizer)
        self.stage.measure(**measures)
        self.stage.spend(tokens=measures["tokens"])
        write_report(directory, measures, mixture, self.stats)

    def texts(self, curator: Curator) -> dict[str, Iterator[Document]]:
        """Every source of natural text, curated, up to its size."""
        recipe = self.recipe
        own = (document for path in recipe.files for document in files.files(path, recipe.section_characters))
        sources: dict[str, tuple[Iterable[Document], float]] = {
            "prose": (python_install.prose(recipe.seed, recipe.section_characters), recipe.prose_megabytes),
            "code": (python_install.code(recipe.seed, recipe.section_characters), recipe.code_megabytes),
            "files": (own, recipe.files_megabytes),
        }
        return {
            name: up_to(curator.texts(documents), megabytes)
            for name, (documents, megabytes) in sources.items()
        }

    def tokenizer(self, texts: Iterable[str]) -> Tokenizer:
        if self.recipe.tokenizer is not None:
            return Tokenizer.from_directory(self.recipe.tokenizer)
        tokenizer = train_bpe(texts, self.recipe.vocab_size)
        if tokenizer.vocab_size < self.recipe.vocab_size:
            raise ConfigError(
                f"vocab_size {self.recipe.vocab_size}: the text only gave {tokenizer.vocab_size} ids; add megabytes of text or take that"
            )
        return tokenizer

    def write_texts(self, name: str, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
        """Natural text, of which every so many documents are held out."""
        every = round(1 / self.recipe.validation) if self.recipe.validation else 0
        parts: dict[bool, list[Document]] = {False: [], True: []}
        for number, document in enumerate(documents, 1):
            parts[every > 0 and number % every == 0].append(document)
        for held_out, part in parts.items():
            if part:
                self.write(VALIDATION * held_out + name, tokenizer, part)

    def write_problems(
        self,
        source: TaskSource,
        difficulties: tuple[int, ...],
        tokenizer: Tokenizer,
        curator: Curator,
        bar: Progress,
    ) -> None:
        """Problems of the training split, and some of the test split to measure the loss on."""
        name = problems.store_of(source.name)
        seed = self.recipe.seed
        drawn = counted(problems.problems(source.name, difficulties, source.count, seed), bar)
        answers: Counter[str] = Counter()

        def documents() -> Iterator[Document]:
            for problem in drawn:
                answers[problem.answer] += 1
                yield problems.document(problem)

        stats = self.write(name, tokenizer, curator.problems(documents()))
        stats.majority = answers.most_common(1)[0][1] / answers.total()
        if held_out := round(source.count * self.recipe.validation):
            unseen = map(
                problems.document, problems.problems(source.name, difficulties, held_out, seed, "test")
            )
            self.write(VALIDATION + name, tokenizer, dict.fromkeys(unseen))

    def write(self, name: str, tokenizer: Tokenizer, documents: Iterable[Document]) -> StoreStats:
        """Tokenize documents into the store `name`."""
        stats = self.stats[name] = StoreStats(name)
        store = TokenStore.from_documents(encode(tokenizer, stats.watch(documents)))
        store.write(store_path(self.stage.directory, name))
        stats.tokens, stats.learned = store.token_count, int(store.loss.sum())
        return stats


def counted(items: Iterable[T], bar: Progress) -> Iterator[T]:
    """The items, each told to the progress bar."""
    for item in items:
        bar.advance()
        yield item
