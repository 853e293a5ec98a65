"""The report as text: its content and size. No text from data becomes markup."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.classify import HIGHEST_CONFIDENCE, LOWEST_CONFIDENCE
from pipeline.commit import Partition
from pipeline.report import GALLERY_SCHEMA, encode_gallery, render_report
from pipeline.run import write_report
from pipeline.storage import Storage, StorageError
from tests.partitions import make_predictions, write_partition

#: Hostile and unusual texts for labels, keys and URIs.
HOSTILE_TEXTS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></svg><script>alert(2)</script>",
    "$x_1$ & friends",
    "evil\u202elabel\x00\x1b[31m",
    "{{ 7 * 7 }}",
    "url(#a) var(--a) id='p1'",
    "日本語のラベル 🥾",
    "a" * 300,
    "' onmouseover='alert(1)",
]
RECORD: dict[str, Any] = {
    "fingerprint": "f" * 64,
    "started_at": "2026-01-02T03:04:05+00:00",
    "config": {"input": {"uri": "s3://in/<b>x\u202e</b>"}, "model": {"path": "m"}, "output": {"topk": 1}},
    "counts": {"shards": 2, "unreadable_shards": 0, "images": 400, "errors": 4, "duplicate_keys": 0},
    "timings": {"planned": 1.0, "executor_ready": 2.0, "first_result": 3.0, "last_result": 12.0},
    "stages": {
        stage: {
            "images": 400,
            "busy_s": busy,
            "wait_s": 5.0,
            "bytes": 10**6,
            "workers": 1,
            "fraction_busy": 0.5,
        }
        for stage, busy in (("storage", 1.0), ("decode", 2.0), ("classify", 9.0), ("commit", 0.5))
    },
    "bound_by": "classify, busy 90% of the time",
    "decoder": "the CPU, exact",
    "causes": [
        {
            "cause": HOSTILE_TEXTS[0],
            "count": 4,
            "samples": [{"shard": HOSTILE_TEXTS[1], "key": HOSTILE_TEXTS[2], "error": HOSTILE_TEXTS[5]}],
        }
    ],
    "versions": {"ray": "2.60.0"},
}


def make_partition(folder: Path, labels: list[str], name: str = "model=m-ffffffff") -> Partition:
    """Writes labels of two runs with targets, a tenth of them wrong, and some error rows."""
    rng, classes, runs = np.random.default_rng(0), len(labels), []
    for run in range(2):
        shards = {}
        for shard in (f"s3://in/<b>x\u202e</b>/{run}-{i}.tar" for i in range(2)):
            target = rng.integers(0, classes, 200)
            wrong = rng.random(200) < 0.1
            given: list[int | None] = np.where(wrong, (target + 1) % classes, target).tolist()
            given[7] = given[70] = None
            scores = rng.uniform(0.5, 1, 200).tolist()
            shards[shard] = make_predictions(shard, labels, given, target.tolist(), scores, HOSTILE_TEXTS[0])
        runs.append(shards)
    uri = str(folder / name)
    write_partition(Storage(), uri, labels, runs, RECORD)
    return Partition.open(Storage(), uri)


def make_gallery(items: list[tuple[Any, ...]]) -> pa.Table:
    """Makes gallery rows from the values of each row."""
    return pa.table([*zip(*items, strict=True)], names=GALLERY_SCHEMA.names).cast(GALLERY_SCHEMA)


def report(uri: str, *against: str) -> Path:
    """Writes the report of the last run; returns the path of the report."""
    return Path(write_report(Partition.open(Storage(), uri), against=against))


def make_page(folder: Path, labels: list[str]) -> str:
    return report(make_partition(folder, labels).uri).read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_page(tmp_path_factory.mktemp("report"), HOSTILE_TEXTS)


class Elements(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(page: str) -> str:
    return " ".join(Elements(page).text.split())


def test_data_never_becomes_an_element_or_an_attribute(page: str) -> None:
    elements = Elements(page)
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "img", "iframe", "object", "link"}
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    for label in HOSTILE_TEXTS[:4] + HOSTILE_TEXTS[5:8]:
        assert label in elements.text
    assert not set("\x00\x1b\u202e") & set(page)


def test_page_loads_nothing_and_allows_no_script(page: str) -> None:
    elements = Elements(page)
    [policy] = [a["content"] for tag, a in elements.found if tag == "meta" and "http-equiv" in a]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script" not in policy
    links = [a[name] for _, a in elements.found for name in ("href", "src", "xlink:href") if name in a]
    assert links
    assert all(str(link).startswith("#") for link in links)
    assert "url(http" not in page
    assert "@import" not in page


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    elements = Elements(page)
    ids = [a["id"] for _, a in elements.found if "id" in a]
    assert len(ids) == len(set(ids))
    for name in ("aria-labelledby", "aria-describedby"):
        assert {str(a[name]) for _, a in elements.found if name in a} <= set(map(str, ids))
    wanted = {str(a[name])[1:] for _, a in elements.found for name in ("href", "xlink:href") if name in a}
    assert wanted <= set(map(str, ids))


def test_counts_of_the_run_and_of_all_labels_are_distinguished(page: str) -> None:
    text = text_of(page)
    assert "Labeled images792all runs, 4 shards" in text
    assert "Images in this run4002 shards, 4 errors" in text
    assert "8 samples in 4 shards could not be labeled. By cause:" in text
    assert "The causes cover" not in text
    assert "of 792 images with a target" in text
    assert "Comparison with the previous run" in text
    assert "Most confused pairs" in text
    assert "Expected calibration error" in text
    assert "classify, busy 90% of the time" in text


@pytest.mark.parametrize("classes", [2, 1000])
def test_page_stays_small_with_many_classes(tmp_path: Path, classes: int) -> None:
    page = make_page(tmp_path, [f"class {i}" for i in range(classes)])
    assert len(page) < 200_000
    assert page.count("<tr>") < 250
    assert ("class_stats.parquet has all classes" in page) == (classes > 50)


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    uri = str(tmp_path / "model=old-ffffffff")
    predictions = make_predictions("/in/a.tar", ["a", "b"], [0, 1, None])
    [run] = write_partition(Storage(), uri, ["a", "b"], [{"/in/a.tar": predictions}])
    report(uri)
    text = Elements(Path(uri, "report.html").read_text()).text
    assert "1 sample in 1 shard could not be labeled. By cause: 1 \xd7 unsupported format" in " ".join(
        text.split()
    )
    assert run in text
    for absent in ("Throughput", "Accuracy against targets", "Comparison with", "Example images"):
        assert absent not in text


def test_labels_and_images_come_before_quality_failures_and_throughput(tmp_path: Path) -> None:
    partition = make_partition(tmp_path, ["a", "b"])
    item = 0, "a", HIGHEST_CONFIDENCE, 0.9, "/in/a.tar", 0, "key", b"\xff\xd8thumbnail"
    Storage().write(f"{partition.uri}/gallery.parquet", encode_gallery(make_gallery([item])))
    elements = Elements(report(partition.uri).read_text())
    ids = [attributes["id"] for tag, attributes in elements.found if tag == "section"]
    assert ids == ["classes", "gallery", "accuracy", "comparison-0", "failures", "throughput", "run"]


def test_only_predicted_classes_are_counted_and_listed(tmp_path: Path) -> None:
    """The classes c and d have targets, and no image is labeled with them."""
    uri, labels = str(tmp_path / "model=m-ffffffff"), ["a", "b", "c", "d", "e"]
    predictions = make_predictions("/in/a.tar", labels, [0, 0, 1, None], [0, 2, 3, 3])
    write_partition(Storage(), uri, labels, [{"/in/a.tar": predictions}])
    page = report(uri).read_text()
    assert "Predicted classes: 2 of 5." in page
    assert "Target classes never predicted 2 of 3" in text_of(page.replace("</dt>", " </dt>"))
    section = page[page.index('<section id="classes"') : page.index('<section id="accuracy"')]
    assert re.findall(r'<th scope="row">([^<]*)</th><td>', section)[:2] == ["a", "b"]
    assert ">c<" not in section


def test_gallery_is_shown_with_escaped_text(tmp_path: Path) -> None:
    partition = make_partition(tmp_path, HOSTILE_TEXTS)
    scores = {HIGHEST_CONFIDENCE: 0.987, LOWEST_CONFIDENCE: 0.123}
    items = [
        (0, HOSTILE_TEXTS[0], selection, score, "/in/a.tar", 1, HOSTILE_TEXTS[1], b"\xff\xd8thumbnail")
        for selection, score in scores.items()
    ]
    Storage().write(f"{partition.uri}/gallery.parquet", encode_gallery(make_gallery(items)))
    path = report(partition.uri)
    elements = Elements(path.read_text())
    images = [attributes for tag, attributes in elements.found if tag == "img"]
    assert len(images) == 2
    for image in images:
        assert set(image) == {"src", "alt"}
        assert str(image["src"]).startswith("data:image/jpeg;base64,/9h0")
        assert image["alt"] == HOSTILE_TEXTS[1]
    assert "Highest confidence 0.987" in text_of(path.read_text())
    assert "Lowest confidence 0.123" in text_of(path.read_text())


def test_comparison_with_another_model_has_drift_and_agreement(tmp_path: Path) -> None:
    mine = make_partition(tmp_path, [f"class {i}" for i in range(10)])
    other = make_partition(tmp_path, [f"class {i + 1}" for i in range(10)], "model=other-ffffffff")
    text = text_of(report(mine.uri, other.uri).read_text())
    assert "Comparison with model=other-ffffffff" in text
    assert "of 792 images labeled in both" in text
    assert "matched by name: 1 only in the reference, 1 only in the current labels" in text
    assert "Most frequent disagreements" in text


def test_limited_reading_of_causes_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "model=m-ffffffff")
    first, second = (
        {shard: make_predictions(shard, ["a"], [0, *[None] * bad], error=error)}
        for shard, bad, error in (("/in/a.tar", 2, "empty"), ("/in/b.tar", 1, "cut off"))
    )
    write_partition(Storage(), uri, ["a"], [first, second], RECORD)
    partition = Partition.open(Storage(), uri)
    stats = partition.manifest.fold_statistics()
    text = text_of(render_report(partition, RECORD, stats).decode())
    assert "3 samples in 2 shards could not be labeled. By cause: 2 \xd7 empty" in text
    assert "/in/b.tar: k1 cut off" in text
    assert "<script>" not in text  # the run's record has hostile causes
    monkeypatch.setattr("pipeline.report.sections.MAX_FILES", 1)
    text = text_of(render_report(partition, RECORD, stats).decode())
    assert "The causes cover 2 samples of the 1 shard with the most errors. By cause: 2 \xd7 empty" in text


def failures(uri: str) -> str:
    """Returns the text of the report about failures."""
    text = text_of(report(uri).read_text())
    return text[text.index("could not be labeled") - 40 :]


def test_copied_partition_has_causes_and_missing_files_are_stated(tmp_path: Path) -> None:
    partition = make_partition(tmp_path / "original", ["a", "b"])
    copy = str(tmp_path / "copy" / partition.name)
    shutil.copytree(partition.uri, copy, copy_function=shutil.copyfile)
    assert "8 samples in 4 shards could not be labeled. By cause: 8 \xd7" in failures(copy)
    next(Path(copy).rglob("1-1.tar.parquet")).unlink()
    expected = "The causes cover 6 samples. 1 prediction file could not be found. By cause: 6 \xd7"
    assert expected in failures(copy)


def test_unreadable_prediction_file_does_not_prevent_the_report(tmp_path: Path) -> None:
    uri = make_partition(tmp_path, ["a", "b"]).uri
    next(Path(uri).rglob("1-1.tar.parquet")).write_bytes(b"another format")
    text = failures(uri)
    assert "8 samples in 4 shards could not be labeled. The causes could not be read: " in text
    assert "1-1.tar.parquet: not a prediction file" in text
    assert "To list all errors with DuckDB:" in text


def test_heading_of_a_comparison_names_the_reference(tmp_path: Path) -> None:
    mine = make_partition(tmp_path, ["a", "b"])
    other = make_partition(tmp_path, ["a", "b"], "model=other-ffffffff")
    run = mine.manifest.runs()[0]
    text = text_of(report(mine.uri, f"{mine.uri}@{run}", f"{other.uri}@{run}").read_text())
    for heading, current in (
        ("the previous run", "labels of this run"),
        (f"run {run}", "all labels"),
        (f"model=other-ffffffff, run {run}", "all labels"),
    ):
        reference = rf"\S+@{run} \(labels of that run that no later run replaced\)"
        pattern = f"Comparison with {heading} Reference labels{reference} Current labels{current} "
        assert re.search(pattern, text)


@pytest.mark.parametrize("rate", [None, 1234.5])
def test_throughput_is_shown_for_runs_with_a_steady_state_only(tmp_path: Path, rate: float | None) -> None:
    partition = make_partition(tmp_path, ["a", "b"])
    record = RECORD | {"images_per_s": rate}
    text = text_of(render_report(partition, record, partition.manifest.fold_statistics()).decode())
    assert ("Images per second1,234.5" in text) == (rate is not None)


def test_missing_record_is_named(tmp_path: Path) -> None:
    partition = make_partition(tmp_path, ["a", "b"])
    with pytest.raises(StorageError, match=r"has no record of run 2026\S+-ffffff"):
        write_report(partition, "20260101T000000.000000Z-ffffff")


def test_report_without_comparisons_can_be_rendered_at_any_time(tmp_path: Path) -> None:
    partition = make_partition(tmp_path, ["a", "b"])
    text = text_of(render_report(partition, RECORD, partition.manifest.fold_statistics()).decode())
    assert "Labeled images792all runs" in text
    assert "Comparison with" not in text


def test_class_statistics_of_the_page_are_the_given_ones(tmp_path: Path) -> None:
    """An overlapping run may have replaced `class_stats.parquet`."""
    partition = make_partition(tmp_path, ["a", "b"])
    stats = partition.manifest.fold_statistics()
    stats.count[:] = [123_456, 1]
    assert "123,456" in render_report(partition, RECORD, stats).decode()
