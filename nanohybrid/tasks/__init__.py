"""Verifiable tasks: one object a family makes problems with worked traces, verifies answers, and keeps the test split apart."""

from nanohybrid.tasks.problem import Problem, Split, Task, final_answer, split_of
from nanohybrid.tasks.registry import DEFAULT_MIX, get, names

__all__ = ["DEFAULT_MIX", "Problem", "Split", "Task", "final_answer", "get", "names", "split_of"]
