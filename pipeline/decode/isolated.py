"""Decodes images in a child process: an image that kills or hangs its decoder affects only its own row."""

import logging
import multiprocessing
import os
import signal
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from cvt.preprocessing import Preprocessor
from pipeline.decode.bounds import DecodeDeadline
from pipeline.decode.cpu import Decoded, decode, hide_pillow_warnings
from pipeline.predictions import ErrorCategory, sample_error

logger = logging.getLogger("cvt_label")

#: Seconds after the timeout at which the kernel ends a decoder that does not read and so does not end.
_GRACE_S = 1.0

_SPAWN = multiprocessing.get_context("spawn")


def decode_or_die(
    data: bytes, preprocessor: Preprocessor, max_pixels: int, fast: bool, timeout_s: float
) -> Decoded:
    """Decodes as `decode` does. SIGPROF ends this process if the decoder hangs. Needs a POSIX system."""
    hide_pillow_warnings()
    signal.setitimer(signal.ITIMER_PROF, timeout_s + _GRACE_S)
    try:
        return decode(data, preprocessor, max_pixels, fast, timeout_s)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class ChildDecoder(AbstractContextManager["ChildDecoder"]):
    """Decodes in a child process, which starts when it is needed; use it as a context manager."""

    def __init__(self) -> None:
        self._child: tuple[SpawnProcess, Connection] | None = None

    def __exit__(self, *error: object) -> None:
        if self._child is not None:
            process, _ = self._child
            process.kill()
            process.join()

    def __call__(
        self, data: bytes, preprocessor: Preprocessor, max_pixels: int, fast: bool, timeout_s: float
    ) -> Decoded:
        """Decodes as `decode` does; the death of the child is an error of the image.

        After SIGKILL, the image is decoded again: when memory is short, the kernel kills any child.
        """
        for _ in range(2):
            process, connection = self._child = self._child or _start_child()
            try:
                connection.send((data, preprocessor, max_pixels, fast, timeout_s))
                decoded: Decoded = connection.recv()
                return decoded
            except (EOFError, OSError):  # the child has died
                self._child = None
                process.join()
            if process.exitcode != -signal.SIGKILL:
                break
        cause = _describe_end(process.exitcode or 0, timeout_s)
        return Decoded(None, None, None, sample_error(ErrorCategory.CANNOT_DECODE, cause))


def _start_child() -> tuple[SpawnProcess, Connection]:
    """Starts a child. After a failure, ends this worker: `ray.task_retries` limits the attempts."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
    try:
        process.start()
        theirs.close()
        ours.recv()  # the child is ready
    except (EOFError, OSError) as error:
        logger.error("a child process for decoding did not start (%r); this worker ends", error)
        os._exit(1)
    return process, ours


def _describe_end(status: int, timeout_s: float) -> str:
    if status == -signal.SIGPROF:
        return DecodeDeadline(timeout_s).message
    if status >= 0:
        return f"the decoder ended with status {status}"
    hint = ", possibly for lack of memory" if status == -signal.SIGKILL else ""
    return f"the decoder was killed by signal {-status} ({signal.Signals(-status).name}){hint}"


def _serve(connection: Connection) -> None:
    """Decodes images that arrive through a connection, until the connection ends."""
    with suppress(OSError):  # if memory is short, the kernel kills this process, not its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    connection.send("ready")
    with suppress(EOFError, OSError):
        while True:
            connection.send(decode_or_die(*connection.recv()))
