"""Command lines in the documentation parse; the files, make targets and extras that they name exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import typer

from jobs.cli import COMMANDS, make_cli
from tests.docs.pages import PAGES, ROOT, Block, blocks, blocks_of, command_lines, inline_code, name_of

#: Options of other programs that the pages mention.
FOREIGN_OPTIONS = {"--metrics-export-port", "--packages", "--signal"}


#: The message of a command with `--device cuda` on a machine without a GPU.
NO_GPU = "PyTorch finds no GPU"


@cache
def command(name: str) -> Any:
    """Returns one command of `cvt-label`, or the group of this name."""
    group: Any = typer.main.get_command(make_cli(name))
    return group.commands[name]


def problem(name: str, words: list[str]) -> str | None:
    """Parses the arguments of a command; returns the message of what does not parse."""
    found = command(name)
    if hasattr(found, "commands"):
        found, words = found.commands[words[0]], words[1:]
    try:
        found.make_context(name, words)
    except typer.Exit:  # of --help
        return None
    except Exception as error:
        return str(error) or repr(error)
    return None


def own_commands(line: str) -> list[list[str]]:
    """Returns the arguments of each command of this project in a line of a shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&>")
    lexer.whitespace_split = True
    found: list[list[str]] = []
    for is_separator, words in groupby(lexer, lambda word: set(word) <= {*";|&>"}):
        part = [] if is_separator else [*words]
        if "cvt-label" in part:
            found.append(part[part.index("cvt-label") + 1 :])
        elif module := next((word for word in part if word.startswith("jobs.")), None):
            assert module in ("jobs.cli", "jobs.label"), f"{module} is not a command"
            command = ["label"] if module == "jobs.label" else []
            found.append(command + part[part.index(module) + 1 :])
    return found


SHELL_BLOCKS = blocks_of("bash")


def test_every_code_block_names_a_language_that_is_checked() -> None:
    kinds = {block.kind for block in blocks()}
    assert kinds <= {"bash", "yaml", "python", "sql", "json", "text", "promql"}


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=lambda block: block.name)
def test_command_lines_in_blocks_parse(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    values = dict(re.findall(r"for (\w+) in (\S+)", block.text))  # of loops, the first
    text = re.sub(r"\$(\w+)", lambda found: values.get(found[1], found[0]), block.text)
    for line in command_lines(text):
        for name, *words in own_commands(line):
            if name != "--version":
                assert problem(name, words) in (None, NO_GPU), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_in_prose_exist(page: Path) -> None:
    for code in inline_code(page):
        if code.startswith("cvt-label ") and "..." not in code:
            name, *words = shlex.split(code)[1:]
            if name in COMMANDS and words:  # else the command is only named
                # An option may be named without the arguments that the command needs.
                assert (problem(name, words) or "Missing").startswith("Missing"), code
        elif found := re.match(r"--[a-z][a-z-]+", code):
            assert found[0] in all_options() | FOREIGN_OPTIONS, code


@cache
def all_options() -> frozenset[str]:
    """Returns the options of all commands."""
    found = set[str]()
    for name in COMMANDS:
        for each in getattr(command(name), "commands", {name: command(name)}).values():
            for parameter in each.params:
                found |= {*parameter.opts, *parameter.secondary_opts}
    return frozenset({*found, "--help", "--version"})


def test_unknown_option_is_found() -> None:
    """The check itself: a wrong option in a line with several commands is noticed."""
    lines = own_commands(
        "RAY_AUTH_MODE=token cvt-label plan --config a.yaml && python -m jobs.cli stats --mst 3"
    )
    assert lines == [["plan", "--config", "a.yaml"], ["stats", "--mst", "3"]]
    [_, (name, *words)] = lines
    assert "--mst" in (problem(name, words) or "")


def test_files_targets_and_extras_of_commands_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    texts = [block.text for block in SHELL_BLOCKS] + [code for page in PAGES for code in inline_code(page)]
    for text in texts:
        for path in re.findall(r"(?<![\w/.])((?:configs|examples)/[\w./-]+\w)", text):
            assert (ROOT / path).exists(), path
        for names in re.findall(r"(?:cvt-label|\.)\[([a-z,]+)\]", text):
            assert set(names.split(",")) <= extras.keys(), names
        for target in re.findall(r"^make ([a-z-]+)", text, re.M):
            assert target in targets, target
