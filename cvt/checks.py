"""What values from JSON files must be; shared by the readers of configurations."""

from __future__ import annotations

import math
from typing import Any


def is_flag(value: Any) -> bool:
    """Whether it is true or false."""
    return isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether it is an integer; to Python, True is one too."""
    return isinstance(value, int) and not is_flag(value)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))
