"""Errors of checkpoints, and helpers for their messages.

Imports no torch, because programs that do not load torch catch these errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pydantic import ValidationError


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded. The message names the file and the cause."""


@contextmanager
def checkpoint_errors(where: object) -> Iterator[None]:
    """Raises any exception of the block as a CheckpointError that begins with `where`.

    A checkpoint's files come from anywhere, and the libraries that read them share no base class of errors.
    """
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None  # `where` names the file
        cause = " ".join((reason or str(error)).split())[:500] or type(error).__name__
        raise CheckpointError(f"{where}: {cause}") from error


def described(error: ValidationError) -> str:
    """The first fault that pydantic found: the field, what it must be, and what it is."""
    fault = error.errors()[0]
    value = json.dumps(fault["input"], default=repr)
    found = value if len(value) <= 80 else f"{value[:77]}..."
    field, *places = fault["loc"]
    name = f"{field}{''.join(f'[{place}]' for place in places)}"
    return f"{name}: {fault['msg']}, not {found}"


def listed(keys: Iterable[str], most: int = 8) -> str:
    """The first `most` keys in order, and the number of the others."""
    names = sorted(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
