"""The error for checkpoints, and helpers for its messages.

Does not import torch, because programs without torch catch this error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

#: Maximum size of a JSON file and of class names. The config.json of a model for ImageNet-22k has 2 MB. The
#: memory of a JSON file also grows with its commas, colons and opening brackets.
MAX_TEXT_BYTES, _MAX_JSON_PARTS = 8 * 1024**2, 450_000


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded. The message names the file and the cause."""


@contextmanager
def checkpoint_errors(where: object, remedy: str = "") -> Iterator[None]:
    """Converts any exception in the block to a CheckpointError: `where`, the cause, and `remedy`.

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
        is_damage = not (isinstance(error, OSError) and error.filename)  # a missing file has a name
        raise CheckpointError(f"{where}: {cause}{remedy if is_damage else ''}") from error


def read_text_bytes(file: Path) -> bytes:
    """Reads a JSON file or class names. Raises `CheckpointError` over the limits."""
    with file.open("rb") as stream:
        content = stream.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise CheckpointError(f"the file has more than {MAX_TEXT_BYTES:,} bytes")
    if file.suffix.lower() == ".json" and sum(map(content.count, (b",", b":", b"[", b"{"))) > _MAX_JSON_PARTS:
        raise CheckpointError(f"the file has more than {_MAX_JSON_PARTS:,} commas, colons and brackets")
    return content


def describe_validation_error(error: ValidationError) -> str:
    """Describes the first error that pydantic found: the field, the requirement and the value."""
    details = error.errors()[0]
    value = json.dumps(details["input"], default=repr)
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    field, *indices = details["loc"]
    name = f"{field}{''.join(f'[{index}]' for index in indices)}"
    return f"{name}: {details['msg']}, not {shown}"
