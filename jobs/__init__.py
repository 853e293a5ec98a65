"""What a person or a scheduler starts; each a thin module over `pipeline`."""

import sys
from importlib.util import find_spec
from pathlib import Path


def _refuse_other_packages() -> None:
    """Ends the process where `pipeline`, `cvt` or `configs` would be imported from somebody else's code.

    This happens to `python -m jobs.label` in a directory that holds packages of these names: Python puts the
    working directory first on `sys.path`.
    """
    root = Path(__file__).resolve().parents[1]
    for name in ("cvt", "pipeline", "configs"):
        spec = find_spec(name)
        if spec is None or not spec.origin or Path(spec.origin).resolve().parents[1] != root:
            place = "is not installed" if spec is None else f"is another package: {spec.origin}"
            sys.stderr.write(f"{name} {place}: run cvt-label, or run this command in another directory\n")
            sys.exit(2)


_refuse_other_packages()
