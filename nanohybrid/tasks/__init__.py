"""Verifiable tasks: each family generates problems with reasoning traces, scores answers, and separates
training from test split."""

from nanohybrid.tasks.problem import Problem, Split, Task, final_answer, split_of
from nanohybrid.tasks.registry import DEFAULT_MIX, get, names

__all__ = ["DEFAULT_MIX", "Problem", "Split", "Task", "final_answer", "get", "names", "split_of"]
