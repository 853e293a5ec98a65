"""The error for checkpoints, and helpers for its messages.

Does not import torch, because programs without torch catch this error.
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
    """Converts any exception in the block to a CheckpointError whose message starts with `where`.

    Checkpoint files may be damaged in any way, and the libraries that read them have no common exception
    class.
    """
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None  # `where` has the file name
        cause = " ".join((reason or str(error)).split())[:500] or type(error).__name__
        raise CheckpointError(f"{where}: {cause}") from error


def describe_validation_error(error: ValidationError) -> str:
    """Describes the first error that pydantic found: the field, the requirement and the value."""
    details = error.errors()[0]
    value = json.dumps(details["input"], default=repr)
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    field, *indices = details["loc"]
    name = f"{field}{''.join(f'[{index}]' for index in indices)}"
    return f"{name}: {details['msg']}, not {shown}"


def join_keys(keys: Iterable[str], limit: int = 8) -> str:
    """Joins the first `limit` keys in sorted order, and adds the number of omitted keys."""
    names = sorted(keys)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
