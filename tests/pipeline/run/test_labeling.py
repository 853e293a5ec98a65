"""Complete runs: real shards in a real S3 server, a real Ray, the bundled checkpoint."""

from __future__ import annotations

import io
import json
import secrets
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cvt.checkpoints import BUNDLED
from jobs.local_s3 import LocalS3
from pipeline.commit import Progress
from pipeline.config import Config, ConfigError, Selection, load_config
from pipeline.predictions import prediction_schema
from pipeline.read import IgnoreReason
from pipeline.report import read_gallery
from pipeline.run import Phase, PreparedRun, RunResult, label, plan_run
from pipeline.statistics import ClassStatistics, class_table, describe_bottleneck
from pipeline.storage import Storage, StorageError
from tests.makers import category_of, make_image, make_parquet, make_tar, make_tar_gz

SAMPLE = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist"

Sample = tuple[str, bytes, int]


#: For tests that do not depend on Ray.
IN_PROCESS = "ray.address=in-process"


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """The first 120 bundled samples: (key, PNG, class id)."""
    found: list[Sample] = []
    with tarfile.open(SAMPLE / "test-0000.tar") as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar.getmembers()[:240]}  # type: ignore[union-attr]
    for name, data in content.items():
        if name.endswith(".png"):
            found.append((name[:-4], data, int(content[f"{name[:-4]}.cls"])))
    return found


def wds(samples: list[Sample]) -> list[tuple[str, bytes]]:
    return [
        member
        for key, png, label in samples
        for member in ((f"{key}.png", png), (f"{key}.cls", b"%d" % label))
    ]


def config(bucket: str, *overrides: str) -> Config:
    base = [f"input.uri={bucket}/in", "model.path=fashion-mnist", f"output.uri={bucket}/out"]
    stages = ["read.concurrency=2", "classify.num_cpus=1", "classify.threads=1"]
    return load_config(Config, None, [*base, *stages, *overrides])


def rows_of(result: RunResult) -> list[dict[str, object]]:
    """All prediction rows, read with a glob as a consumer does."""
    storage = result.job.partition.storage
    uris = [o.uri for o in storage.list(result.job.partition.uri) if "/predictions/" in o.uri]
    tables = [pq.read_table(io.BytesIO(storage.read(uri))) for uri in uris]
    for table in tables:
        assert table.schema.remove_metadata().equals(prediction_schema())
    return pa.concat_tables(tables).to_pylist()


@pytest.fixture(scope="module")
def formats(ray_local: None, s3_server: LocalS3, samples: list[Sample]) -> tuple[RunResult, list[Progress]]:
    """One run on a tar, a compressed tar, two Parquet files and image files, 20 images each."""
    name = f"formats-{secrets.token_hex(4)}"
    s3_server.create_bucket(name)
    storage, bucket = Storage(), f"s3://{name}"
    parts = [samples[i : i + 20] for i in range(0, 100, 20)]
    labels = [label for _, _, label in parts[2]]
    encoded = [png for _, png, _ in parts[2]]
    struct = [{"bytes": png, "path": f"{key}.png"} for key, png, _ in parts[3]]
    for key, data in {
        "a.tar": make_tar(wds(parts[0])),
        "deep/er/b.tar.gz": make_tar_gz(wds(parts[1])),
        "c.parquet": make_parquet({"image": encoded, "label": labels}),
        "d.parquet": make_parquet({"image": struct, "label": [target for _, _, target in parts[3]]}),
        "README.md": b"not a shard",
        "_SUCCESS": b"",
        **{f"loose/{key}.png": png for key, png, _ in parts[4]},
    }.items():
        storage.write(f"{bucket}/in/{key}", data)
    seen: list[Progress] = []
    job = config(bucket, "input.label_column=label", "read.chunk_images=7", "output.topk=10")
    return label(job, on_progress=lambda progress, plan: seen.append(progress)), seen


def test_every_format_is_labeled_completely(formats: tuple[RunResult, list[Progress]]) -> None:
    result, _ = formats
    rows = rows_of(result)
    assert len(rows) == 100
    assert {row["error"] for row in rows} == {None}
    shards = {str(row["shard"]).partition("/in/")[2] for row in rows}
    files = {name for name in shards if not name.startswith("images-")}
    assert files == {"a.tar", "deep/er/b.tar.gz", "c.parquet", "d.parquet"}
    assert result.plan.listing.ignored == {IgnoreReason.HIDDEN: 1, IgnoreReason.FORMAT: 1}
    assert result.plan.describe() == "5 shards: 5 new; 5 to label"


def test_labels_equal_those_of_transformers(
    formats: tuple[RunResult, list[Progress]], samples: list[Sample]
) -> None:
    from transformers import ConvNextImageProcessorPil
    from transformers import CvtForImageClassification as Reference

    model = Reference.from_pretrained(BUNDLED["fashion-mnist"]).eval()
    processor = ConvNextImageProcessorPil.from_pretrained(BUNDLED["fashion-mnist"])
    # Keys are row numbers in Parquet without paths, and names of the samples in the other formats.
    rows = rows_of(formats[0])
    by_key = {Path(str(row["key"])).stem: row for row in rows}
    by_key |= {samples[40 + int(str(r["key"]))][0]: r for r in rows if str(r["shard"]).endswith("c.parquet")}
    for i, (key, png, target) in enumerate(samples[:100]):
        row = by_key[key]
        image = Image.open(io.BytesIO(png)).convert("RGB")
        with torch.inference_mode():
            logits = model(**processor(image, return_tensors="pt")).logits[0].double()
        p = logits.softmax(dim=0)
        assert row["label_id"] == int(p.argmax())
        assert row["label"] == model.config.id2label[int(p.argmax())]
        assert row["score"] == pytest.approx(float(p.max()), abs=1e-5)
        assert row["topk_label_ids"] == p.argsort(descending=True).tolist()
        assert row["entropy"] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)
        assert (row["width"], row["height"]) == (28, 28)
        assert row["target_id"] == (None if i >= 80 else target)


def test_statistics_cover_all_rows(formats: tuple[RunResult, list[Progress]]) -> None:
    result, _ = formats
    partition = result.job.partition
    written = pq.read_table(io.BytesIO(partition.storage.read(f"{partition.uri}/class_stats.parquet")))
    rows = pa.Table.from_pylist(rows_of(result), schema=prediction_schema())
    expected = class_table(ClassStatistics.from_predictions(rows, 10), partition.labels, 10)
    assert written.equals(expected)
    with_target = [row for row in rows.to_pylist() if row["target_id"] is not None]
    hits = np.mean([row["target_id"] == row["label_id"] for row in with_target])
    assert result.statistics is not None
    assert result.statistics.top1_accuracy() == pytest.approx(hits)
    assert hits > 0.8  # a trained checkpoint


def test_manifest_record_and_report_describe_the_run(formats: tuple[RunResult, list[Progress]]) -> None:
    result, _ = formats
    partition, storage = result.job.partition, result.job.partition.storage
    manifest = pq.read_table(io.BytesIO(storage.read(partition.manifest.uri))).to_pylist()
    assert sum(row["rows"] for row in manifest) == 100
    for row in manifest:
        assert storage.stat(f"{partition.uri}/{row['output']}").size > 0
        assert row["version"] == next(s.version for s in result.plan.shards if s.uri == row["uri"])
    record = json.loads(storage.read(f"{partition.uri}/runs/{result.run}.json"))
    assert record["status"] == "complete"
    assert record["selection"] == {"retry_errors": False, "relabel": False, "prune": False}
    assert record["counts"]["images"] == 100
    assert record["config"]["read"]["chunk_images"] == 7
    assert record["versions"]["ray"]
    stages = record["stages"]
    assert list(stages) == ["storage", "decode", "classify", "commit"]
    assert {stage["images"] for stage in stages.values()} == {100}
    for stage in stages.values():
        assert stage["busy_s"] > 0
        assert stage["bytes"] > 0
        assert 0 < stage["fraction_busy"] <= 1
    assert stages["decode"]["bytes"] == 100 * 28 * 28 * 3
    assert record["bound_by"] == describe_bottleneck(record["stages"])
    assert record["decoder"] == "the CPU, exact"
    assert record["gpu_utilization"] is None
    assert record["timings"]["first_result"] <= record["timings"]["first_commit"]
    assert record["timings"]["ended"] == result.timings["ended"] >= record["timings"]["last_result"]
    assert {name: record[name] for name in result.throughput} == result.throughput
    report = storage.read(f"{partition.uri}/report.html").decode()
    gallery = read_gallery(storage, partition.uri).to_pylist()
    samples = {(item["shard"], item["index"]) for item in gallery}
    assert samples <= {(row["shard"], row["index"]) for row in rows_of(result)}
    assert {item["label_id"] for item in gallery} == {row["label_id"] for row in rows_of(result)}
    assert Image.open(io.BytesIO(gallery[0]["thumbnail"])).size == (28, 28)
    assert "Ankle boot" in report
    assert "T-shirt/top" in report


def test_progress_ends_at_the_totals(formats: tuple[RunResult, list[Progress]]) -> None:
    result, seen = formats
    assert [p.images for p in seen] == sorted(p.images for p in seen)
    assert (seen[-1].images, seen[-1].shards) == (100, len(result.plan.shards))


def test_output_contains_no_secrets(formats: tuple[RunResult, list[Progress]], s3_server: LocalS3) -> None:
    partition = formats[0].job.partition
    for info in partition.storage.list(partition.uri):
        data = partition.storage.read(info.uri)
        assert s3_server.secret_key.encode() not in data
        assert s3_server.access_key.encode() not in data


def test_bad_samples_are_error_rows_and_all_others_are_labeled(
    bucket: str, storage: Storage, samples: list[Sample]
) -> None:
    png, jpeg = samples[0][1], make_image(1, (640, 480))
    members = [
        *wds(samples[:5]),
        ("corrupt.jpg", jpeg[:200] + bytes(100) + b"\xff" * 50),
        ("truncated.png", png[: len(png) // 2]),
        ("empty.jpg", b""),
        ("bomb.png", _png_of_size(60_000, 60_000)),
        ("text.jpg", b"<html>not an image</html>"),
        ("alone.cls", b"3"),
        ("badlabel.png", png),
        ("badlabel.cls", b"boot-ish"),
        ("photo.cr2", b"II*\0\x10\0\0\0CR"),
        *wds(samples[5:10]),
        ("gray16.png", _gray16()),
    ]
    storage.write(f"{bucket}/in/mixed.tar", make_tar(members))
    result = label(config(bucket, IN_PROCESS, "read.chunk_images=4"))
    rows = rows_of(result)
    errors = {str(row["key"]): str(row["error"]) for row in rows if row["error"] is not None}
    good = {str(row["key"]) for row in rows if row["error"] is None}
    assert good == {key for key, _, _ in samples[:10]} | {"gray16", "badlabel"}
    assert {key: category_of(error).value for key, error in errors.items()} == {
        "corrupt": "cannot decode",
        "truncated": "cannot decode",
        "empty": "empty image",
        "bomb": "dimensions too large",
        "text": "unsupported format",
        "alone": "no image",
        "photo": "no image",
    }
    assert "60000" in errors["bomb"]
    assert "starts with b'<html>" in errors["text"]
    for row in rows:
        if row["key"] == "badlabel":
            assert (row["label_id"] is None, row["target_id"]) == (False, None)
        if row["error"] is not None:
            assert row["label"] is row["score"] is row["topk_label_ids"] is row["entropy"] is None
    totals = result.totals
    assert (totals.images, totals.errors, totals.unreadable) == (19, 7, [])
    partition = result.job.partition
    record = json.loads(storage.read(f"{partition.uri}/runs/{result.run}.json"))
    assert record["counts"]["unmatched_targets"] == 1
    [unmatched] = record["unmatched_targets"]
    assert (unmatched["cause"], unmatched["count"]) == ("'boot-ish' is not a class of the model", 1)
    assert unmatched["samples"] == [{"shard": f"{bucket}/in/mixed.tar", "key": "badlabel"}]
    assert partition.manifest.read(["unmatched_targets"]).to_pylist() == [{"unmatched_targets": 1}]
    causes = record["causes"]
    assert sum(cause["count"] for cause in causes) == 7
    assert {sample["key"] for cause in causes for sample in cause["samples"]} == set(errors)
    report = storage.read(f"{partition.uri}/report.html").decode()
    assert "7 samples in 1 shard could not be labeled" in report
    assert "dimensions too large: N x N pixels, more than the limit of N" in report


def test_unreadable_shard_is_reported_and_the_others_are_labeled(
    bucket: str, storage: Storage, samples: list[Sample]
) -> None:
    whole = make_tar(wds(samples[:30]))
    storage.write(f"{bucket}/in/good.tar", whole)
    storage.write(f"{bucket}/in/cut.tar", whole[: len(whole) // 2])
    storage.write(f"{bucket}/in/not.parquet", b"PAR1 not a parquet file at all")
    result = label(config(bucket, IN_PROCESS, "read.chunk_images=5"))
    assert {str(row["shard"]) for row in rows_of(result)} == {f"{bucket}/in/good.tar"}
    assert len(rows_of(result)) == 30
    unreadable = {row.uri: row.error for row in result.totals.unreadable}
    assert set(unreadable) == {f"{bucket}/in/cut.tar", f"{bucket}/in/not.parquet"}
    for uri, error in unreadable.items():
        assert error is not None
        assert uri in error
    partition = result.job.partition
    record = json.loads(partition.storage.read(f"{partition.uri}/runs/{result.run}.json"))
    assert record["status"] == "incomplete"
    assert {failure["uri"]: failure["error"] for failure in record["unreadable"]} == unreadable
    assert not result.is_complete


@pytest.mark.slow
def test_relabeling_writes_the_same_bytes(bucket: str, storage: Storage, samples: list[Sample]) -> None:
    for i in range(3):
        storage.write(f"{bucket}/in/{i}.tar", make_tar(wds(samples[i * 30 : i * 30 + 30])))

    def predictions(result: RunResult) -> dict[str, bytes]:
        return {
            o.uri: storage.read(o.uri)
            for o in storage.list(result.job.partition.uri)
            if "/predictions/" in o.uri
        }

    job = config(bucket, IN_PROCESS, "read.chunk_images=8", "output.embedding=float16")
    first = predictions(label(job))
    assert len(first) == 3
    again = label(job, selection=Selection(relabel=True))
    assert again.totals.shards == 3
    assert predictions(again) == first


def test_model_with_fewer_classes_than_topk_keeps_all_classes(tmp_path: Path) -> None:
    Storage().write(f"{tmp_path}/in/a.tar", make_tar([("0.jpg", make_image(0))]))
    [row] = rows_of(label(config(str(tmp_path), IN_PROCESS, "output.topk=11")))
    assert sorted(row["topk_label_ids"]) == list(range(10))


def test_output_inside_the_input_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output\.uri: .* is inside the input"):
        plan_run(config(str(tmp_path), f"output.uri=file://{tmp_path}/in/labels"))


def test_phases_are_reported_in_order(tmp_path: Path) -> None:
    Storage().write(f"{tmp_path}/in/a.tar", make_tar([("0.jpg", make_image(0))]))
    phases: list[Phase] = []
    job = config(str(tmp_path), IN_PROCESS)
    label(job, on_phase=phases.append)
    before = [Phase.LISTING, Phase.LOADING_MODEL, Phase.PLANNING]
    assert phases == [*before, Phase.STARTING_STAGES, Phase.SUMMARIZING]
    phases.clear()
    label(job, on_phase=phases.append)
    assert phases == before


def test_unwritable_output_is_named(tmp_path: Path, s3_server: LocalS3) -> None:
    Storage().write(f"{tmp_path}/in/a.tar", make_tar([("0.jpg", make_image(0))]))
    (tmp_path / "out").write_text("a file")
    for output, cause in ((f"{tmp_path}/out", ""), ("s3://no-such-bucket/out", "bucket 'no-such-bucket'")):
        with pytest.raises(StorageError) as caught:
            label(config(str(tmp_path), IN_PROCESS, f"output.uri={output}"))
        assert caught.value.uri.startswith(f"{output}/model=")
        assert caught.value.cause.startswith(cause)


def _png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header has this size, without pixel data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _gray16() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((28, 28), 30_000, np.uint16)).save(out, "png")
    return out.getvalue()


def test_progress_counts_only_written_shards(bucket: str, storage: Storage, samples: list[Sample]) -> None:
    """At each progress report, the finished shards are complete in the output."""
    for i in range(4):
        storage.write(f"{bucket}/in/{i}.tar", make_tar(wds(samples[i * 20 : i * 20 + 20])))

    def check(progress: Progress, prepared: PreparedRun) -> None:
        found = [o for o in storage.list(prepared.job.partition.uri) if "/predictions/" in o.uri]
        assert len(found) >= progress.shards
        for info in found:
            assert pq.read_metadata(io.BytesIO(storage.read(info.uri))).num_rows == 20

    label(config(bucket, IN_PROCESS, "read.chunk_images=6"), on_progress=check)


def test_rows_have_names_of_target_and_best_classes_where_asked_for(tmp_path: Path) -> None:
    members = [("a.jpg", make_image(1)), ("a.cls", b"3"), ("b.jpg", make_image(2)), ("c.jpg", b"no image")]
    Storage().write(f"{tmp_path}/in/x.tar", make_tar(members))
    partition = label(
        config(str(tmp_path), "ray.address=in-process", "output.label_names=true", "output.topk=3")
    ).partition
    [table] = partition.read_labels()
    names = partition.labels
    first, second, failed = table.to_pylist()
    assert first["target"] == names[3]
    assert second["target"] is failed["target"] is failed["topk_labels"] is None
    for row in (first, second):
        assert row["topk_labels"] == [names[i] for i in row["topk_label_ids"]]
        assert row["topk_labels"][0] == row["label"]
