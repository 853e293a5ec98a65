"""The documentation site builds without warnings, and the reference pages match the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from docs.generate import PAGES, REFERENCE
from jobs.console import ExitStatus
from pipeline import label
from pipeline.commit.manifest import _SCHEMA as MANIFEST_SCHEMA
from pipeline.dataflow import metrics
from pipeline.predictions import ErrorCategory, Footer, prediction_schema
from pipeline.report import GALLERY_SCHEMA
from pipeline.statistics import CLASS_STATS_SCHEMA
from tests.makers import make_image, make_tar
from tests.runs import run_config

ROOT = Path(__file__).parents[2]


def table_under(page: str, heading: str) -> list[list[str]]:
    """Returns the rows of the first table under a heading, without the heads of its columns."""
    text = (REFERENCE / page).read_text().partition(f" {heading}\n")[2]
    rows = text[re.search(r"^\|", text, re.M).start() :].partition("\n\n")[0]  # type: ignore[union-attr]
    return [[cell.strip() for cell in row.strip("|").split(" |")] for row in rows.splitlines()[2:]]


def columns(page: str, heading: str) -> list[tuple[str, str]]:
    """Returns names and types of the columns that a table describes."""
    return [
        (name.strip("`"), kind.replace("&lt;", "<").replace("&gt;", ">"))
        for name, kind, *_ in table_under(page, heading)
    ]


def expected_columns(schema: pa.Schema) -> list[tuple[str, str]]:
    return [(field.name, re.sub(r"(element|item): ", "", str(field.type))) for field in schema]


@pytest.mark.parametrize("page", PAGES)
def test_generated_page_is_up_to_date(page: str) -> None:
    is_current = PAGES[page]() == (REFERENCE / page).read_text(encoding="utf-8")
    assert is_current, f"docs/reference/{page} does not match the code: run `make docs`"


class Assets(HTMLParser):
    """Collects the addresses from which a page loads scripts, styles, fonts and images."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe") or (tag == "link" and values.get("rel") != "canonical"):
            self.found |= {value for name in ("src", "href") if (value := values.get(name))}


@pytest.mark.slow
def test_site_builds_without_warnings_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: cvt-label[docs]")
    pytest.importorskip("material", reason="mkdocs-material is not installed: cvt-label[docs]")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: cvt-label[docs]")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assets = Assets()
        assets.feed(page.read_text(encoding="utf-8"))
        assert not [address for address in assets.found if "//" in address], page
    api = (tmp_path / "site/reference/python-api.html").read_text(encoding="utf-8")
    for name in ("pipeline.label", "pipeline.Config", "cvt.Engine", "cvt.keras.TFCvtModel"):
        assert f'id="{name}"' in api


def test_index_names_every_page_by_its_title() -> None:
    docs = ROOT / "docs"
    linked = set()
    for title, path in re.findall(r"\[([^\]]+)\]\(([\w/-]+\.md)\)", (docs / "index.md").read_text()):
        found = re.match(r"# (.*)\n", (docs / path).read_text())  # mkdocs reads the title from line 1
        assert found is not None
        assert found[1] == title, path
        linked.add(docs / path)
    assert linked == {*docs.rglob("*.md")} - {docs / "index.md"}


def test_python_api_page_lists_every_public_name() -> None:
    import cvt
    import pipeline

    described = set(re.findall(r"^::: ([\w.]+)$", (REFERENCE / "python-api.md").read_text(), re.M))
    public = {f"{module.__name__}.{name}" for module in (pipeline, cvt) for name in module.__all__}
    assert public <= described
    for name in described - public:
        assert name.startswith(("cvt.architecture.", "cvt.checkpoints.", "cvt.keras.")), name


def test_output_schema_page_lists_every_prediction_column() -> None:
    found = columns("output-schema.md", "Predictions")
    assert found[-1] == ("embedding", "fixed_size_list<float16 or float32>")
    assert found[:-1] == expected_columns(prediction_schema(label_names=True))


@pytest.mark.parametrize(
    ("heading", "schema"),
    [("Class statistics", CLASS_STATS_SCHEMA), ("Manifest", MANIFEST_SCHEMA), ("Gallery", GALLERY_SCHEMA)],
)
def test_output_schema_page_lists_every_column(heading: str, schema: pa.Schema) -> None:
    assert columns("output-schema.md", heading) == expected_columns(schema)


def test_output_schema_page_lists_footer_keys_and_error_categories() -> None:
    keys = [row[0].strip("`") for row in table_under("output-schema.md", "Footer")]
    assert keys == [f"cvt_label.{field.name}" for field in fields(Footer)]
    categories = [row[0].strip("`") for row in table_under("output-schema.md", "Error categories")]
    assert categories == [*map(str, ErrorCategory)]


def test_output_schema_page_lists_every_key_of_a_run_record(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(make_tar([("a.jpg", make_image())]))
    partition = label(run_config(tmp_path)).partition
    [record] = Path(partition.uri).glob("runs/*.json")
    described = {
        key for row in table_under("output-schema.md", "Run record") for key in re.findall(r"`(\w+)`", row[0])
    }
    assert described == {*json.loads(record.read_text()), "error"}  # of a failed run


def test_exit_statuses_page_lists_every_status() -> None:
    rows = table_under("exit-statuses.md", "Exit statuses")
    assert [int(row[0]) for row in rows] == [*ExitStatus]


def test_metrics_page_lists_every_metric_with_its_labels() -> None:
    described = {row[0].strip("`"): row[3] for row in table_under("metrics.md", "Metrics")}
    prefix = f"ray_{metrics._PREFIX}"
    expected: dict[str, Any] = {
        f"{prefix}{name}_total": more for name, (_, more) in metrics._COUNTERS.items()
    }
    assert described.keys() == {*expected, f"{prefix}batch_seconds"}
    for name, more in expected.items():
        assert all(f"`{label}`" in described[name] for label in more)
