"""Problems as plain documents, `{prompt}\\n{trace}\\n{answer}\\n`; the prompt has no loss."""

import random
from collections.abc import Iterator, Sequence

from nanohybrid import tasks
from nanohybrid.data.documents import Document, TextSpan
from nanohybrid.tasks import Problem


def problems(
    name: str, difficulties: Sequence[int], count: int, seed: int, split: tasks.Split = "train"
) -> Iterator[Problem]:
    """`count` problems of a task, its difficulties in turn. They depend on the seed alone."""
    task = tasks.get(name)
    rng = random.Random(f"{seed} {name} {split}")
    for index in range(count):
        yield task.make(rng, difficulties[index % len(difficulties)], split)


def document(problem: Problem) -> Document:
    """A problem as a pretraining document."""
    solution = f"{problem.trace}\n{problem.answer}\n" if problem.trace else f"{problem.answer}\n"
    return Document(
        store_of(problem.family), (TextSpan(problem.prompt + "\n", loss=False), TextSpan(solution))
    )


def store_of(task: str) -> str:
    """The store of a task; together they are the group `tasks` of a mixture."""
    return "tasks-" + task.replace("/", "-")
