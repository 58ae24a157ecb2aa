"""Checks of configuration values that mixers and the whole configuration share.

Each raises ConfigError in one line.
"""

from __future__ import annotations

from typing import Any

from nanohybrid.errors import ConfigError, shown

FLOAT32_SMALLEST, FLOAT32_LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127
"""The smallest normal and the largest number of float32."""
INT_LARGEST = 2**31 - 1


def check_float32(name: str, value: object, positive: bool = False, fix: str = "take one of them") -> None:
    """Raise ConfigError where float32 cannot hold a number: every executor computes with it in float32.

    Refused are NaN, infinities, negative numbers, numbers beyond 3.4e38, and numbers below 1.2e-38, which
    float32 rounds towards zero.
    """
    if not is_number(value) or value != value:
        raise ConfigError(f"{name} is {shown(value)}: it must be a finite number")
    number: Any = value
    if number < 0 or (positive and number == 0):
        raise ConfigError(f"{name} is {shown(value)}: it must be {'positive' if positive else 'at least 0'}")
    if number > FLOAT32_LARGEST or 0 < number < FLOAT32_SMALLEST:
        raise ConfigError(f"{name} is {shown(value)}: float32 holds numbers from 1.2e-38 to 3.4e38; {fix}")


def check_int(name: str, value: object, least: int = 1, ranged: bool = True) -> None:
    """Raise ConfigError unless `value` is a whole number, and where `ranged` one from `least` to 2^31 - 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}: it must be a whole number")
    if not ranged:
        return
    if value < least:
        raise ConfigError(f"{name} is {shown(value)}: it must be {'positive' if least else 'at least 0'}")
    if value > INT_LARGEST:
        raise ConfigError(f"{name} is {shown(value)}: it must be at most {INT_LARGEST:,}")


def check_divides(config: Any, whole: str, part: str) -> None:
    """Raise ConfigError unless the field `whole` is a multiple of the field `part`."""
    if getattr(config, whole) % getattr(config, part):
        raise ConfigError(
            f"{whole} is {getattr(config, whole)}: it must be a multiple of {part} = {getattr(config, part)}"
        )


def is_number(value: object) -> bool:
    """Whether `value` is an int or a float; a bool is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
