"""What a corpus is made of, as one value."""

from dataclasses import dataclass, field
from pathlib import Path

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
    """How many are drawn; those that were drawn before are dropped."""
    difficulties: tuple[int, ...] = ()
    """Which ones, in turn; empty for all that the task has."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(
                f"task {self.name}: count is {self.count}; leave the task out or draw at least one problem"
            )

    def resolved(self) -> tuple[int, ...]:
        """The difficulties; ConfigError where the task has no such one."""
        offered = tasks.get(self.name).difficulties
        wrong = [difficulty for difficulty in self.difficulties if difficulty not in offered]
        if wrong:
            raise ConfigError(
                f"task {self.name} has difficulties {offered[0]} to {offered[-1]}, not {wrong[0]}"
            )
        return self.difficulties or tuple(offered)


DEFAULT_TASKS = tuple(TaskSource(name) for name in tasks.DEFAULT_MIX)

# Diversity first, quality last, with the paper's switches: natural text gives way to worked traces.
DEFAULT_PHASES = (
    Phase(0.6, {"code": 0.15, "prose": 0.15, "tasks": 0.7}),
    Phase(0.9, {"code": 0.05, "prose": 0.1, "tasks": 0.85}),
    Phase(1.0, {"code": 0.05, "prose": 0.05, "tasks": 0.9}),
)


@dataclass(frozen=True)
class DataRecipe:
    """A corpus."""

    seed: int = 0
    """Decides the order of the sources and every generated problem."""
    vocab_size: int = 512
    """Ids of the tokenizer that is trained on the natural text."""
    tokenizer: Path | None = None
    """A directory with a tokenizer.json to use instead."""
    code_megabytes: float = 1.5
    """Standard library sources to keep, after filtering."""
    prose_megabytes: float = 1.5
    """Docstrings and documentation to keep, after filtering."""
    files: tuple[Path, ...] = ()
    """Directories (or files) of .txt, .md, .py and .jsonl documents of one's own."""
    files_megabytes: float = 100.0
    """How much of them to keep, after filtering."""
    tasks: tuple[TaskSource, ...] = DEFAULT_TASKS
    """Generated problems with worked traces."""
    section_characters: int = 3000
    """About where long texts are cut into documents."""
    quality: QualityLimits = field(default_factory=QualityLimits)
    """Limits of the quality filter."""
    near_duplicates: float = 0.8
    """Similarity from which two texts count as one; 0 switches this filter (extra `data`) off."""
    validation: float = 0.02
    """Share of the documents to hold out for the loss on unseen text; of problems, this many more, from their test split."""
    evaluation: tuple[Path, ...] = ()
    """Files of prompts, as in `files`, that no document may hold."""
    phases: tuple[Phase, ...] = DEFAULT_PHASES
    """What is read when, by stores (code, prose, files, tasks-NAME) or groups of them (tasks)."""

    def __post_init__(self) -> None:
        if min(self.code_megabytes, self.prose_megabytes, self.files_megabytes) < 0:
            raise ConfigError("megabytes of text cannot be negative; give 0 to leave a source out")
        if not 0 <= self.near_duplicates <= 1:
            raise ConfigError(f"near_duplicates is a similarity between 0 and 1, not {self.near_duplicates}")
        if not 0 <= self.validation <= 0.5:
            raise ConfigError(f"validation is a share between 0 and 0.5, not {self.validation}")
        if self.section_characters < 1:
            raise ConfigError(
                f"section_characters is {self.section_characters}; documents need at least one character"
            )
        names = [source.name for source in self.tasks]
        if len(set(names)) < len(names):
            raise ConfigError("a task is named twice; give one entry with all its difficulties")
        Mixture(self.phases)  # which refuses phases that do not follow each other

    @property
    def mixture(self) -> Mixture:
        """The phases as a mixture."""
        return Mixture(self.phases)
