"""Private temporary folders. A later run removes the folders of a process that was killed."""

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: Start of the names. Specific, because an unlocked folder with such a name is deleted.
PREFIX = "cvt-label-tmp-"


@contextlib.contextmanager
def temporary_folder(parent: str | Path | None = None, keep_on_error: bool = False) -> Iterator[Path]:
    """Creates a folder of mode 0700, and removes the folder at the end of the block.

    The folder is locked during the block. A lock ends with its process, so an unlocked folder belongs to a
    process that was killed. Such folders of this user in the same parent are removed first.

    Args:
        parent: the parent of the folder; default: the folder for temporary files.
        keep_on_error: leave the folder to the next run after an error, which an interrupt is not.
    """
    parent = Path(parent or tempfile.gettempdir())
    is_kept = False
    for abandoned in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), locked(abandoned, fcntl.LOCK_NB, os.O_NOFOLLOW) as descriptor:
            if os.fstat(descriptor).st_uid == os.geteuid():
                shutil.rmtree(abandoned, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        folder = None
        while folder is None or not folder.exists():  # another process may remove the folder before the lock
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            with contextlib.suppress(OSError):  # some file systems have no locks
                stack.enter_context(locked(folder))
        remove = atexit.register(functools.partial(shutil.rmtree, folder, ignore_errors=True))
        try:
            yield folder
        except Exception:
            is_kept = keep_on_error
            raise
        finally:
            if not is_kept:
                remove()  # also registered above, for an interrupt here
            atexit.unregister(remove)


@contextlib.contextmanager
def locked(folder: Path, lock_flags: int = 0, open_flags: int = 0) -> Iterator[int]:
    """Holds the lock of a folder; yields the folder's descriptor."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | open_flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | lock_flags)
        yield descriptor
    finally:
        os.close(descriptor)
