"""The commands: each module is one command, a thin layer over `pipeline`."""

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


_check_package_origins()
