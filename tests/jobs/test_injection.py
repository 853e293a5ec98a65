"""Names from data that would be code elsewhere: in paths, pages, terminals and queries they stay names."""

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
#: What a bundled model's ten classes are called here.
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
    "x" * 5000,
]
KEYS = [*LABELS, "/etc/passwd", "..", "a\\..\\b", "\u202egnp.exe"]
#: Of files in the input; a disk takes neither a slash nor NUL in them.
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
class Labelled:
    """A run over all of these names: where it wrote, and what it and `stats` and `plan` printed."""

    root: Path
    said: dict[str, str]

    @property
    def predictions(self) -> ds.Dataset:
        return ds.dataset(sorted((self.root / "out").glob("model=*/predictions/**/*.parquet")))

    def file(self, pattern: str) -> Path:
        (found,) = (self.root / "out").glob(f"model=*/{pattern}")
        return found


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    root = tmp_path_factory.mktemp("injection")
    (root / "in").mkdir()
    (root / "labels.json").write_text(json.dumps(LABELS))
    images = [make_image(i) for i in range(len(KEYS))]
    (root / "in" / SHARDS[0]).write_bytes(make_parquet({"image": images, "key": KEYS}))
    members = [
        (f"{name}.jpg", make_image(i)) for i, name in enumerate(["../../x", "/abs", "%2e%2e/y", "..."])
    ]
    for name in SHARDS[1:]:
        (root / "in" / name).write_bytes(make_tar([*members, ("<b>.jpg", b"no image")]))
    (root / "in" / CUT).write_bytes(make_tar(members)[:3000])
    job = {
        "input": {"uri": f"{root}/in", "key_column": "key"},
        "model": {"path": "fashion-mnist", "labels": f"{root}/labels.json"},
        "output": {"uri": f"{root}/out"},
        "ray": {"address": "in-process"},
    }
    (root / "job.yaml").write_text(json.dumps(job))  # which is YAML, too
    planned = cvt_label("plan", "--config", f"{root}/job.yaml", "--shards")
    done = cvt_label_process("label", "--config", f"{root}/job.yaml")
    counted = cvt_label("stats", "--config", f"{root}/job.yaml")
    statuses = planned.returncode, done.returncode, counted.returncode
    assert statuses == (0, 3, 0), planned.stderr + done.stderr + counted.stderr
    results = {"plan": planned, "label": done, "stats": counted}
    said = {name: result.stdout + result.stderr for name, result in results.items()}
    return Labelled(root, said)


def test_nothing_is_written_outside_of_the_output(labelled: Labelled) -> None:
    assert {path.name for path in labelled.root.iterdir()} == {"in", "out", "job.yaml", "labels.json"}
    assert len(list((labelled.root / "in").iterdir())) == len(SHARDS) + 1
    (partition,) = (labelled.root / "out").iterdir()
    assert {path.name for path in partition.iterdir()} == {
        "predictions", "runs", "class_stats.parquet", "gallery.parquet", "manifest.parquet", "report.html",
        "lease.json",
    }  # fmt: skip
    files = [path for path in (partition / "predictions").rglob("*") if path.is_file()]
    assert len(files) == len(SHARDS)
    for path in files:
        below = path.relative_to(partition / "predictions")
        assert below.parent == Path("file") / labelled.root.relative_to("/") / "in"
        assert path.name.isprintable()
        assert not set(path.name) & set("<>\"='*?:[]") - {"'"}


def test_keys_and_labels_are_in_the_table_as_they_are(labelled: Labelled) -> None:
    table = labelled.predictions.to_table()
    keys = table.filter(pc.ends_with(table["shard"], ".parquet")).sort_by("index")["key"].to_pylist()
    assert keys == KEYS
    tars = set(table.filter(pc.ends_with(table["shard"], ".tar"))["key"].to_pylist())
    assert {"../../x", "/abs", "%2e%2e/y", "<b>"} <= tars
    assert pq.read_table(labelled.file("class_stats.parquet"))["label"].to_pylist() == LABELS
    assert set(table["label"].drop_null().unique().to_pylist()) <= set(LABELS)


def test_a_filter_by_such_a_name_finds_its_rows(labelled: Labelled) -> None:
    everything = labelled.predictions.to_table()
    for label in LABELS:
        expected = sum(each == label for each in everything["label"].to_pylist())
        assert labelled.predictions.count_rows(filter=ds.field("label") == label) == expected
    for key in KEYS:
        assert labelled.predictions.count_rows(filter=ds.field("key") == key) >= 1


def test_the_manifest_lists_every_shard_by_its_own_name(labelled: Labelled) -> None:
    rows = pq.read_table(labelled.file("manifest.parquet")).to_pylist()
    assert {Path(row["uri"]).name for row in rows} == {*SHARDS, CUT}


def test_the_report_shows_them_as_text(labelled: Labelled) -> None:
    page = labelled.file("report.html").read_text()
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
def test_terminals_and_logs_get_them_as_text_on_their_own_line(labelled: Labelled, command: str) -> None:
    said = labelled.said[command]
    for character in ("\x1b", "\x00", "\u202e"):
        assert character not in said, repr(character)
    assert not [line for line in said.splitlines() if line.strip().startswith("2026-01-01")]
    if command != "stats":
        assert r"\n2026-01-01 00:00:00,000 INFO forged" in said


def test_a_record_of_the_log_is_one_line() -> None:
    record = logging.LogRecord(
        "cvt_label", logging.INFO, "", 0, "shard %s", (f"x{FORGED}{CLEAR_SCREEN}",), None
    )
    line = OneLineFormatter("%(levelname)s %(message)s").format(record)
    assert line == r"INFO shard x\n2026-01-01 00:00:00,000 INFO forged\x1b[2J"
