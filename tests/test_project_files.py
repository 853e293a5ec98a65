"""The files around the code agree with each other: metadata, locked versions, Makefile, hosted CI, hooks."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pipeline

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_is_the_same_in_all_files() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {PROJECT["version"], pipeline.__version__, citation["version"]} == {pipeline.__version__}


def test_every_dependency_has_a_locked_version_in_its_range() -> None:
    locked = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert (specifier.operator, requirement.url) == ("==", None), line
            locked[canonicalize_name(requirement.name)] = specifier.version
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    dependencies = [Requirement(text) for group in groups for text in group]
    for requirement in dependencies:
        if requirement.name != PROJECT["name"]:
            version = locked.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement}: run `make lock`"
            assert requirement.specifier.contains(version), f"{requirement}: run `make lock`"


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)[0].split()
    done = subprocess.run(
        ["make", "--no-print-directory"],  # a make above this test would print it
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert sorted(line.split()[1] for line in lines) == sorted(targets)
    assert max(map(len, lines)) <= 80


def test_hosted_ci_runs_the_check_on_supported_python_versions() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["check"]
    assert {"run": ".ci/run"} in job["steps"]
    supported = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert job["strategy"]["matrix"]["python-version"] == supported
    actions = [step["uses"] for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions)


def test_hooks_need_no_network() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert {hook["language"] for hook in config["repos"][0]["hooks"]} == {"system"}


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_page_names_existing_files_and_targets(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    paths = re.findall(r"`((?:cvt|pipeline|jobs|configs|tests|docs|examples)/[^`]*)`", text)
    missing = [path for path in links + paths if "://" not in path and not (ROOT / path).exists()]
    assert not missing
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M)) <= set(targets)


def test_contributing_names_existing_functions_and_classes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = "".join(path.read_text() for name in ("pipeline", "jobs") for path in (ROOT / name).rglob("*.py"))
    names = {name for name in re.findall(r"`([A-Za-z_]+)`", text) if re.search(r"_|[a-z][A-Z]", name)}
    names = {name for name in names if not name.isupper() and not name.startswith("test_")}
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} == set()


@pytest.mark.parametrize("pattern", PROJECT["license-files"])
def test_license_files_exist(pattern: str) -> None:
    assert list(ROOT.glob(pattern))
