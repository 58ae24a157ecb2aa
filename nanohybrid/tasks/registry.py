"""Every task by its name."""

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

# What a model of half a million parameters learns in minutes; swaps take longer.
DEFAULT_MIX: tuple[str, ...] = ("assignments", "running", "sums", "parity", "nested")

GYM_PREFIX = "gym/"


def register(family: Family) -> None:
    """Make a family known under its name. Raises InputError where another one has it."""
    if type(FAMILIES.get(family.name, family)) is not type(family):
        raise InputError(f"a task is called {family.name!r} already: choose another name")
    FAMILIES[family.name] = family


def names() -> list[str]:
    """The names of our own families; besides them there is `gym/NAME` for every generator of reasoning-gym (extra `rl`)."""
    return list(FAMILIES)


def get(name: str) -> Task:
    """The task called `name`."""
    if name in FAMILIES:
        return FAMILIES[name]
    if name.startswith(GYM_PREFIX):
        from nanohybrid.tasks.gym import Gym  # reasoning-gym takes four seconds to import

        return Gym(name.removeprefix(GYM_PREFIX))
    raise InputError(
        f"there is no task {name!r}; there are {', '.join(FAMILIES)} and {GYM_PREFIX}NAME from reasoning-gym"
    )
