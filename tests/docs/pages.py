"""The documentation as tests see it: its pages, their code blocks, and the code in their prose."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.M | re.S)
_LINE_CONTINUED = re.compile(r"\\\n\s*")


class Block(NamedTuple):
    """A fenced code block.

    Attributes:
        page: path of the page under the root of the repository.
        number: place of the block in its page, from 1.
        kind: the language that the page names.
    """

    page: str
    number: int
    kind: str
    text: str

    @property
    def name(self) -> str:
        """Name of the block in test ids and tracebacks."""
        return f"{self.page} block {self.number}"


def name_of(page: Path) -> str:
    """Returns the path of a page under the root of the repository."""
    return str(page.relative_to(ROOT))


@cache
def blocks() -> tuple[Block, ...]:
    """Returns the code blocks of all pages."""
    return tuple(
        Block(name_of(page), number, found[2], re.sub(f"^{found[1]}", "", found[3], flags=re.M))
        for page in PAGES
        for number, found in enumerate(_BLOCK.finditer(page.read_text()), 1)
    )


def blocks_of(*kinds: str, page: str | None = None) -> list[Block]:
    """Returns the blocks of these kinds, of all pages or of one."""
    return [block for block in blocks() if block.kind in kinds and page in (None, block.page)]


def inline_code(page: Path) -> list[str]:
    """Returns the code in the prose and the tables of a page."""
    prose = _BLOCK.sub("", page.read_text())
    return [code.replace("\\|", "|").strip() for code in re.findall(r"`([^`\n]+)`", prose)]


def command_lines(shell: str) -> list[str]:
    """Returns the lines of a shell block without comments, continued lines as one."""
    lines = _LINE_CONTINUED.sub(" ", shell).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
