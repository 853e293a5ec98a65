"""Names from data that look like code are inert in paths, pages, terminals and queries."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from jobs.console import OneLineFormatter
from tests.command import cvt_label, cvt_label_process
from tests.makers import make_image, make_parquet, make_tar

pytestmark = pytest.mark.slow

CLEAR_SCREEN = "\x1b[2J"
FORGED = "\n2026-01-01 00:00:00,000 INFO forged"
#: Class names of the bundled model in these tests.
LABELS = [
    "../../x",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; DROP TABLE labels; --",
    f"{CLEAR_SCREEN}red",
    f"two{FORGED}",
    "%2e%2e/%2e%2e/x",
    "\x00nul",
    "{{ 7 * 7 }} [bold]",
    "x" * 1000,
]
KEYS = [*LABELS, "/etc/passwd", "..", "a\\..\\b", "\u202egnp.exe"]
#: Names of input files. A file system allows neither a slash nor NUL in them.
SHARDS = [
    f"{CLEAR_SCREEN}a.parquet",
    f"b{FORGED}.tar",
    "<img src=x onerror=alert(1)>.tar",
    "'; DROP TABLE x; --.tar",
    "%2e%2e%2fup.tar",
    "model=y.tar",
]
CUT = f"cut{FORGED}{CLEAR_SCREEN}<script>alert(1)<b>.tar"


@dataclass(frozen=True)
class LabeledNames:
    """A run over all of these names: its folder, and the output of `plan`, `label` and `stats`."""

    root: Path
    output: dict[str, str]

    @property
    def predictions(self) -> ds.Dataset:
        return ds.dataset(sorted((self.root / "out").glob("model=*/predictions/**/*.parquet")))

    def file(self, pattern: str) -> Path:
        (found,) = (self.root / "out").glob(f"model=*/{pattern}")
        return found


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> LabeledNames:
    root = tmp_path_factory.mktemp("injection")
    (root / "in").mkdir()
    (root / "labels.json").write_text(json.dumps(LABELS))
    images = [make_image(i) for i in range(len(KEYS))]
    (root / "in" / SHARDS[0]).write_bytes(make_parquet({"image": images, "key": KEYS}))
    members = [
        (f"{name}.jpg", make_image(i)) for i, name in enumerate(["../../x", "/abs", "%2e%2e/y", "..."])
    ]
    for name in SHARDS[1:]:
        (root / "in" / name).write_bytes(make_tar([*members, ("<b>.jpg", b"not an image")]))
    (root / "in" / CUT).write_bytes(make_tar(members)[:3000])
    job = {
        "input": {"uri": f"{root}/in", "key_column": "key"},
        "model": {"path": "fashion-mnist", "labels": f"{root}/labels.json"},
        "output": {"uri": f"{root}/out"},
        "ray": {"address": "in-process"},
    }
    (root / "job.yaml").write_text(json.dumps(job))  # JSON is YAML
    planned = cvt_label("plan", "--config", f"{root}/job.yaml", "--shards")
    done = cvt_label_process("label", "--config", f"{root}/job.yaml")
    counted = cvt_label("stats", "--config", f"{root}/job.yaml")
    statuses = planned.returncode, done.returncode, counted.returncode
    assert statuses == (0, 3, 0), planned.stderr + done.stderr + counted.stderr
    results = {"plan": planned, "label": done, "stats": counted}
    output = {name: result.stdout + result.stderr for name, result in results.items()}
    return LabeledNames(root, output)


def test_run_writes_only_to_the_output(labeled: LabeledNames) -> None:
    assert {path.name for path in labeled.root.iterdir()} == {"in", "out", "job.yaml", "labels.json"}
    assert len(list((labeled.root / "in").iterdir())) == len(SHARDS) + 1
    (partition,) = (labeled.root / "out").iterdir()
    assert {path.name for path in partition.iterdir()} == {
        "predictions", "runs", "class_stats.parquet", "gallery.parquet", "manifest.parquet", "report.html",
        "lease.json",
    }  # fmt: skip
    files = [path for path in (partition / "predictions").rglob("*") if path.is_file()]
    assert len(files) == len(SHARDS)
    for path in files:
        below = path.relative_to(partition / "predictions")
        assert below.parent == Path("file") / labeled.root.relative_to("/") / "in"
        assert path.name.isprintable()
        assert not set(path.name) & set("<>\"='*?:[]") - {"'"}


def test_keys_and_labels_are_stored_unchanged(labeled: LabeledNames) -> None:
    table = labeled.predictions.to_table()
    keys = table.filter(pc.ends_with(table["shard"], ".parquet")).sort_by("index")["key"].to_pylist()
    assert keys == KEYS
    tars = set(table.filter(pc.ends_with(table["shard"], ".tar"))["key"].to_pylist())
    assert {"../../x", "/abs", "%2e%2e/y", "<b>"} <= tars
    assert pq.read_table(labeled.file("class_stats.parquet"))["label"].to_pylist() == LABELS
    assert set(table["label"].drop_null().unique().to_pylist()) <= set(LABELS)


def test_filter_by_name_finds_its_rows(labeled: LabeledNames) -> None:
    everything = labeled.predictions.to_table()
    for label in LABELS:
        expected = sum(each == label for each in everything["label"].to_pylist())
        assert labeled.predictions.count_rows(filter=ds.field("label") == label) == expected
    for key in KEYS:
        assert labeled.predictions.count_rows(filter=ds.field("key") == key) >= 1


def test_manifest_lists_every_shard_by_name(labeled: LabeledNames) -> None:
    rows = pq.read_table(labeled.file("manifest.parquet")).to_pylist()
    assert {Path(row["uri"]).name for row in rows} == {*SHARDS, CUT}


def test_report_escapes_names(labeled: LabeledNames) -> None:
    page = labeled.file("report.html").read_text()
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Tags().feed(page)
    assert "table" in {tag for tag, _ in tags}
    assert not [tag for tag, attributes in tags if "onerror" in attributes or attributes.get("src") == "x"]
    assert "alert(1)<" not in page
    assert "&lt;script&gt;alert(1)" in page  # the shard that couldn't be read
    assert "49 [bold]" not in page


@pytest.mark.parametrize("command", ["plan", "label", "stats"])
def test_output_escapes_control_characters(labeled: LabeledNames, command: str) -> None:
    output = labeled.output[command]
    for character in ("\x1b", "\x00", "\u202e"):
        assert character not in output, repr(character)
    assert not [line for line in output.splitlines() if line.strip().startswith("2026-01-01")]
    if command != "stats":
        assert r"\n2026-01-01 00:00:00,000 INFO forged" in output


def test_log_record_is_one_line() -> None:
    record = logging.LogRecord(
        "cvt_label", logging.INFO, "", 0, "shard %s", (f"x{FORGED}{CLEAR_SCREEN}",), None
    )
    line = OneLineFormatter("%(levelname)s %(message)s").format(record)
    assert line == r"INFO shard x\n2026-01-01 00:00:00,000 INFO forged\x1b[2J"
