"""The pages of inputs: each has a short, complete configuration and says what to check."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_job_config
from tests.docs.pages import ROOT, blocks_of, name_of

INPUTS = sorted((ROOT / "docs/how-to/inputs").glob("*.md"))


@pytest.mark.parametrize("page", INPUTS, ids=name_of)
def test_page_of_an_input_has_a_complete_configuration_of_six_lines(page: Path, tmp_path: Path) -> None:
    first, *_ = blocks_of("yaml", page=name_of(page))
    lines = [line for line in first.text.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 6, first.text
    (tmp_path / "job.yaml").write_text(first.text)
    load_job_config(tmp_path / "job.yaml")
    assert "\n## What to check\n" in page.read_text()
