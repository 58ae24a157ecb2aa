"""All tasks by name."""

from nanohybrid.errors import InputError
from nanohybrid.tasks.assignments import Assignments
from nanohybrid.tasks.nested import Nested
from nanohybrid.tasks.parity import Parity
from nanohybrid.tasks.problem import Family, Task
from nanohybrid.tasks.running import Running
from nanohybrid.tasks.sums import Sums
from nanohybrid.tasks.swaps import Swaps

FAMILIES: dict[str, Family] = {
    family.name: family for family in (Assignments(), Running(), Sums(), Parity(), Nested(), Swaps())
}

# The families that a model of 0.5 M parameters learns in minutes; swaps take longer.
DEFAULT_MIX: tuple[str, ...] = ("assignments", "running", "sums", "parity", "nested")

GYM_PREFIX = "gym/"


def register(family: Family) -> None:
    """Register a family under its name. Raises InputError where the name is taken."""
    if type(FAMILIES.get(family.name, family)) is not type(family):
        raise InputError(f"a task is called {family.name!r} already: choose another name")
    FAMILIES[family.name] = family


def names() -> list[str]:
    """Names of the built-in families.

    `gym/NAME` is a task for each generator of reasoning-gym (extra `rl`).
    """
    return list(FAMILIES)


def get(name: str) -> Task:
    """The task of this name. Raises InputError for an unknown one."""
    if name in FAMILIES:
        return FAMILIES[name]
    if name.startswith(GYM_PREFIX):
        from nanohybrid.tasks.gym import Gym  # reasoning-gym takes four seconds to import

        return Gym(name.removeprefix(GYM_PREFIX))
    raise InputError(
        f"unknown task {name!r}; known are {', '.join(FAMILIES)} and {GYM_PREFIX}NAME from reasoning-gym"
    )
