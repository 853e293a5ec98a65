"""The time limit of readers."""

import time
from typing import Any

from pipeline.read.samples import ReadTimeoutError


class Deadline:
    """The time limit for reading one sample, without the time that the consumer of the sample takes."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Starts the time of the next sample."""
        self._end = time.monotonic() + self._seconds

    def check(self) -> None:
        """Raises `ReadTimeoutError` after the time limit."""
        if time.monotonic() > self._end:
            cause = f"reading one sample took more than {self._seconds:g} s (read.timeout_s)"
            raise ReadTimeoutError(cause)


class TimedFile:
    """A binary file that checks a deadline before each read."""

    def __init__(self, file: Any, deadline: Deadline) -> None:
        self._file = file
        self._deadline = deadline

    def read(self, size: int = -1) -> bytes:
        """Reads as the file does."""
        self._deadline.check()
        content: bytes = self._file.read(size)
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
