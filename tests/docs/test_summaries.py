"""The summaries of `cvt-label label` in the documentation have the fields that the command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.label import run
from tests.docs.pages import Block, blocks_of
from tests.makers import make_image, make_tar
from tests.runs import run_config

#: Fields that depend on the dataset.
OPTIONAL = {"ignored", "accuracy"}


def field_names(output: str) -> list[str]:
    """Returns the names of the fields of a summary, which follows the table of the classes."""
    lines = output[re.search(r"^plan  ", output, re.M).start() :].splitlines()  # type: ignore[union-attr]
    return [found[1] for line in lines if (found := re.match(r"(\S+(?: \S+)?)  +\S", line))]


SUMMARIES = [block for block in blocks_of("text") if re.search(r"^report  ", block.text, re.M)]


def test_pages_show_summaries() -> None:
    assert len(SUMMARIES) >= 4


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[str]]:
    """The fields of a run that labels (True), and of the next run, which has nothing to label (False)."""
    root = tmp_path_factory.mktemp("run")
    (root / "in").mkdir()
    (root / "in/a.tar").write_bytes(make_tar([("a.jpg", make_image()), ("a.cls", b"3")]))
    (root / "in/ignored.txt").write_bytes(b"")
    return {labels: summary_of(root) for labels in (True, False)}


def summary_of(root: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("jobs.console.print_fields", lambda fields: lines.extend(fields))
        run(run_config(root))
    return lines


@pytest.mark.parametrize("block", SUMMARIES, ids=lambda block: block.name)
def test_summary_on_a_page_has_the_fields_that_label_prints(
    block: Block, printed: dict[bool, list[str]]
) -> None:
    shown = field_names(block.text)
    expected = printed["; 0 to label" not in block.text]
    assert shown == [name for name in expected if name in shown or name not in OPTIONAL]
