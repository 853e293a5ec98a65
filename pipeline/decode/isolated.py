"""Decodes images in a child process: an image that kills or hangs its decoder affects only its own row."""

import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.decode.bounds import BYTES_PER_PIXEL, DecodeDeadline
from pipeline.decode.cpu import Decoded, DecodeOptions, child_decoders, decode, hide_pillow_warnings
from pipeline.decode.plugins import REQUIREMENTS
from pipeline.predictions import ErrorCategory, sample_error

logger = logging.getLogger("cvt_label")

#: Seconds after the timeout at which the kernel ends a decoder that does not read and so does not end.
_GRACE_S = 1.0
#: Memory of a child in addition to pixels and file, in bytes.
_OTHER_MEMORY = 256 << 20


#: The child process of each thread, which ends with the thread.
_own = threading.local()


def decode_or_die(data: bytes, options: DecodeOptions) -> Decoded:
    """Decodes as `decode` does. SIGPROF ends this process if the decoder hangs. Needs a POSIX system."""
    signal.setitimer(signal.ITIMER_PROF, options.timeout_s + _GRACE_S)
    try:
        return decode(data, options)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def decode_in_child(data: bytes, options: DecodeOptions) -> Decoded:
    """Decodes as `decode` does, with limited memory; the death of the child is an error of the image.

    After SIGKILL, the image is decoded again: when memory is short, the kernel kills any child.
    """
    for _ in range(2):
        process, connection = _own.child = getattr(_own, "child", None) or _start_child()
        try:
            connection.send((data, options))
            decoded: Decoded = connection.recv()
            return decoded
        except (EOFError, OSError):  # the child has died
            _own.child = None
            process.wait()
        if process.returncode != -signal.SIGKILL:
            break
    cause = _describe_end(process.returncode, options.timeout_s)
    return Decoded(None, None, None, sample_error(ErrorCategory.CANNOT_DECODE, cause))


child_decoders.update(dict.fromkeys(REQUIREMENTS, decode_in_child))


def _start_child() -> tuple[subprocess.Popen[bytes], Connection]:
    """Starts a child. After a failure, ends this process: `ray.task_retries` limits the attempts."""
    ours, theirs = Pipe()
    # `multiprocessing` would run the user's script in the child.
    program = f"from pipeline.decode.isolated import serve; serve({theirs.fileno()})"
    command = [sys.executable, "-P", "-c", program]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        ours.recv()  # the child is ready
    except (EOFError, OSError) as error:
        logger.error("a child process for decoding did not start (%r); this process ends", error)
        os._exit(1)
    return process, ours


def _describe_end(status: int, timeout_s: float) -> str:
    if status == -signal.SIGPROF:
        return DecodeDeadline(timeout_s).message
    if status >= 0:
        return f"the decoder ended with status {status}"
    # At the limit of the memory, some libraries abort.
    hint = ", possibly for lack of memory" if -status in (signal.SIGKILL, signal.SIGABRT) else ""
    return f"the decoder was killed by signal {-status} ({signal.Signals(-status).name}){hint}"


def serve(file_descriptor: int) -> None:
    """Decodes images that arrive through a connection, until the connection ends."""
    child_decoders.clear()
    hide_pillow_warnings()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the parent ends this process
    connection = Connection(file_descriptor)
    with suppress(OSError):  # if memory is short, the kernel kills this process, not its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    connection.send("ready")
    with suppress(EOFError, OSError):
        while True:
            image, options = connection.recv()
            _limit_memory(BYTES_PER_PIXEL * options.max_pixels + 6 * len(image) + _OTHER_MEMORY)
            connection.send(decode_or_die(image, options))


def _limit_memory(size: int) -> None:
    """Limits the memory that this process allocates from now on, in bytes; does nothing except on Linux."""
    with suppress(OSError, ValueError):  # ValueError: the limit of the user is lower
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        maximum = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (used + size, maximum))
