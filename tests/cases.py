"""Inputs from public bug reports, in the folder that the environment variable `CASES_DIR` names."""

import os
from pathlib import Path

import pytest


def case_input(name: str) -> Path:
    """Returns the folder with the input of a case; skips the test without cases."""
    root = os.environ.get("CASES_DIR")
    if not root:
        pytest.skip("needs CASES_DIR: a folder of cases")
    return Path(root, name, "in")
