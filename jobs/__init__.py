"""The commands: each module is one command, a thin layer over `pipeline`."""

import atexit
import gc
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path


def _check_package_origins() -> None:
    """Ends the process if `cvt`, `pipeline` or `configs` would be imported from another project.

    `python -m jobs.label` puts the working directory first on `sys.path`. Packages with these names in the
    working directory would be imported instead of the packages of this project.
    """
    root = Path(__file__).resolve().parents[1]
    for name in ("cvt", "pipeline", "configs"):
        spec = find_spec(name)
        if spec is None or not spec.origin or Path(spec.origin).resolve().parents[1] != root:
            problem = "is not installed" if spec is None else f"is another package: {spec.origin}"
            sys.stderr.write(f"{name} {problem}: run cvt-label, or run this command in another directory\n")
            sys.exit(2)


if sys.argv[0] == "-m" or Path(sys.argv[0]).name == "cvt-label":  # "-m": Python is about to run a module
    # Until the command handles these signals. Importing its packages takes about a second.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os._exit(130))
    # Without a last search for cycles among all objects of PyTorch and Ray, the process ends 0.2 s earlier.
    atexit.register(gc.freeze)
_check_package_origins()
