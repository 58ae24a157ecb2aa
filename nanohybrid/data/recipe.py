"""The recipe of a corpus: sources, tokenizer, filters and mixture."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from nanohybrid import tasks
from nanohybrid.data.curate import QualityLimits
from nanohybrid.data.mixture import Mixture, Phase
from nanohybrid.errors import ConfigError


@dataclass(frozen=True)
class TaskSource:
    """Problems of one task."""

    name: str
    """The task."""
    count: int = 24_000
    """Number of problems to draw; duplicates are dropped."""
    difficulties: tuple[int, ...] = ()
    """Difficulties, in turn; empty for all of the task."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(
                f"task {self.name}: count is {self.count}; leave the task out or draw at least one problem"
            )

    def resolved(self) -> tuple[int, ...]:
        """The difficulties. Raises ConfigError for one that the task does not have."""
        offered = tasks.get(self.name).difficulties
        wrong = [difficulty for difficulty in self.difficulties if difficulty not in offered]
        if wrong:
            raise ConfigError(
                f"task {self.name} has difficulties {offered[0]} to {offered[-1]}, not {wrong[0]}"
            )
        return self.difficulties or tuple(offered)


DEFAULT_TASKS = tuple(TaskSource(name) for name in tasks.DEFAULT_MIX)

# Diverse text first, high quality last, with the paper's switch points (section 2): reasoning traces replace
# natural text.
DEFAULT_PHASES = (
    Phase(0.6, {"code": 0.15, "prose": 0.15, "tasks": 0.7}),
    Phase(0.9, {"code": 0.05, "prose": 0.1, "tasks": 0.85}),
    Phase(1.0, {"code": 0.05, "prose": 0.05, "tasks": 0.9}),
)


@dataclass(frozen=True)
class DataRecipe:
    """The corpus."""

    RENAMED: ClassVar[dict[str, str]] = {
        "near_duplicates": "near_duplicate_threshold",
        "validation": "validation_fraction",
        "evaluation": "decontaminate_against",
    }

    seed: int = 0
    """Seed of the order of the sources and of the generated problems."""
    vocab_size: int = 512
    """Vocabulary size of the tokenizer, which is trained on the natural text."""
    tokenizer: Path | None = None
    """A directory with a tokenizer.json, to use instead of training one."""
    code_megabytes: float = 1.5
    """Million characters of the standard library's sources, after filtering."""
    prose_megabytes: float = 1.5
    """Million characters of docstrings and documentation, after filtering."""
    files: tuple[Path, ...] = ()
    """Your own documents: directories or files of .txt, .md, .py and .jsonl."""
    files_megabytes: float = 100.0
    """Million characters of `files`, after filtering."""
    tasks: tuple[TaskSource, ...] = DEFAULT_TASKS
    """Generated problems with reasoning traces."""
    section_characters: int = 3000
    """Long texts are split into documents of about this many characters."""
    quality: QualityLimits = field(default_factory=QualityLimits)
    near_duplicate_threshold: float = 0.8
    """Jaccard similarity from which texts count as duplicates (extra `data`); 0 turns this filter off."""
    validation_fraction: float = 0.02
    """Share of the documents held out for the validation loss; of problems, this share is added from the test
    split."""
    decontaminate_against: tuple[Path, ...] = ()
    """Files of evaluation prompts, as in `files`; documents that contain one are dropped."""
    phases: tuple[Phase, ...] = DEFAULT_PHASES
    """Phases of the mixture, by stores (code, prose, files, tasks-NAME) or groups of them (tasks)."""

    def __post_init__(self) -> None:
        if min(self.code_megabytes, self.prose_megabytes, self.files_megabytes) < 0:
            raise ConfigError("megabytes of text must not be negative; 0 leaves a source out")
        if not 0 <= self.near_duplicate_threshold <= 1:
            raise ConfigError(
                f"near_duplicate_threshold is {self.near_duplicate_threshold}; it must be between 0 and 1"
            )
        if not 0 <= self.validation_fraction <= 0.5:
            raise ConfigError(
                f"validation_fraction is {self.validation_fraction}; it must be between 0 and 0.5"
            )
        if self.section_characters < 1:
            raise ConfigError(
                f"section_characters is {self.section_characters}; documents need at least one character"
            )
        names = [source.name for source in self.tasks]
        if len(set(names)) < len(names):
            raise ConfigError("a task is named twice; give one entry with all its difficulties")
        Mixture(self.phases)  # raises for phases that are not consecutive

    @property
    def mixture(self) -> Mixture:
        """The phases as a mixture."""
        return Mixture(self.phases)
