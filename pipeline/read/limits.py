"""Limits of time and size that every reader shares."""

import hashlib
import time
from typing import Any

from pipeline.predictions import ErrorCategory, sample_error
from pipeline.read.samples import ReadTimeoutError, Sample

#: Maximum size of a key in UTF-8, and the part of a longer key that is kept.
MAX_KEY_BYTES, _KEPT_KEY_BYTES = 4096, 1000
_MAX_MESSAGE = 200


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


def limit_texts(sample: Sample) -> Sample:
    """Returns the sample; with a key over the limit, an error whose key is a prefix and a hash."""
    if sample.unmatched is not None:
        sample.unmatched = sample.unmatched[:_MAX_MESSAGE]
    key = sample.key.encode(errors="backslashreplace")  # names of local files may have surrogates
    if len(key) <= MAX_KEY_BYTES:
        sample.key = key.decode()
        return sample
    error = sample_error(ErrorCategory.INVALID_KEY, f"the key has more than {MAX_KEY_BYTES} bytes")
    start, digest = key[:_KEPT_KEY_BYTES].decode(errors="ignore"), hashlib.blake2b(key, digest_size=16)
    sample.key = f"{start}...{digest.hexdigest()}"
    return sample.fail(error)
