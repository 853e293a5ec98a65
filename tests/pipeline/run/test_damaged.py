"""Shards that cannot be read to their end, with `input.on_damaged_shard: keep`."""

from __future__ import annotations

import gzip
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.label import print_result
from jobs.local_s3 import LocalS3
from pipeline.commit import ManifestRow, lease, rebuilt_rows
from pipeline.config import Selection
from pipeline.predictions import read_footer
from pipeline.read import Shard, read_samples, split_into_chunks
from pipeline.read.samples import ShardError
from pipeline.run import RunResult, label, plan_run
from pipeline.storage import Storage
from tests.cases import case_input
from tests.fault_proxy import FaultProxy
from tests.makers import make_image, make_parquet, make_tar
from tests.partitions import manifest_rows
from tests.pipeline.replaying import Place
from tests.read_options import read_options
from tests.runs import run_config

KEEP = "input.on_damaged_shard=keep"
MEMBERS = [
    (f"{i}.{kind}", make_image(i) if kind == "jpg" else b"3") for i in range(9) for kind in ("jpg", "cls")
]


def put(root: object, **shards: bytes) -> None:
    for name, data in shards.items():
        Storage().write(f"{root}/in/{name.replace('_', '.')}", data)


def row_of(result: RunResult, name: str) -> ManifestRow:
    [row] = [row for row in manifest_rows(result.partition.manifest) if row.uri.endswith(f"/{name}")]
    return row


def keys(result: RunResult, name: str) -> list[str]:
    labels = Place(result.partition.uri.rpartition("/out/")[0]).labels()
    return [row["key"] for uri, rows in labels.items() if uri.endswith(f"/{name}") for row in rows]


def record_of(result: RunResult) -> dict[str, Any]:
    return result.partition.record(result.run)


def damaged_parquet() -> bytes:
    """Returns a file of three row groups, of which the last has a page with a wrong checksum."""
    images = [random.Random(i).randbytes(2000) for i in range(12)]
    data = make_parquet(
        {"image": images},
        row_group_size=4,
        compression="none",
        write_page_checksum=True,
        use_dictionary=False,
    )
    place = data.index(images[9]) + 500
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_readable_part_of_every_format_is_labeled_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = make_tar(MEMBERS)
    put(
        tmp_path,
        good_tar=tar,
        cut_tar=tar[: tar.index(b"3.cls") + 100],  # within the header: the sample 3 is not complete
        between_tar=tar[: tar.index(b"3.jpg")],  # all members are complete, and there is no end
        damaged_tar_gz=gzip.compress(tar + tar, compresslevel=0)[:20_000],
        pages_parquet=damaged_parquet(),
    )
    result = label(run_config(tmp_path, KEEP))
    assert keys(result, "cut.tar") == keys(result, "between.tar") == ["0", "1", "2"]
    assert len(keys(result, "pages.parquet")) == 8
    assert 3 <= len(keys(result, "damaged.tar.gz")) <= 8
    cut = row_of(result, "cut.tar")
    assert (cut.rows, cut.error, cut.failed_version) == (3, None, None)
    assert "after 3 samples (the last key was '2'): the tar is damaged or truncated" in (cut.damage or "")
    with Storage().open(f"{result.partition.uri}/{cut.output}") as file:
        assert read_footer("", file).damage == cut.damage
    assert row_of(result, "good.tar").damage is None
    damaged = record_of(result)["damaged"]
    assert (cut.uri, 3, cut.damage) in [(each["uri"], each["rows"], each["damage"]) for each in damaged]
    assert (record_of(result)["status"], len(damaged)) == ("incomplete", 4)
    assert (result.is_complete, record_of(result)["counts"]["damaged_shards"]) == (False, 4)
    print_result(result)
    shown = "".join(capsys.readouterr().err.split())
    assert "".join(f"labeled in part: {cut.damage}".split()) in shown
    assert (
        "Of these, 4 are labeled as far as they are readable"
        in Path(result.partition.uri, "report.html").read_text()
    )


def test_next_run_labels_nothing_and_is_not_complete_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, a_tar=make_tar(MEMBERS), b_tar=make_tar(MEMBERS)[:4000])
    first = label(run_config(tmp_path, KEEP))
    for settings in ([KEEP], []):
        again = label(run_config(tmp_path, *settings))
        assert (again.plan.shards, again.is_complete) == ([], False)
        assert record_of(again)["status"] == "incomplete"
        assert again.plan.describe() == "2 shards: 2 done, 1 of the done only in part; 0 to label"
        print_result(again)
        assert "labeled in part: 1 shard" in capsys.readouterr().err
    [retried] = plan_run(run_config(tmp_path, KEEP), Selection(retry_errors=True)).plan.shards
    assert retried.uri.endswith("b.tar")
    put(tmp_path, b_tar=make_tar(MEMBERS))
    repaired = label(run_config(tmp_path, KEEP))
    assert repaired.is_complete
    assert row_of(repaired, "b.tar").damage is None
    assert row_of(first, "b.tar").rows == 9


def test_shard_without_a_readable_sample_is_unreadable_and_not_read_again(tmp_path: Path) -> None:
    put(tmp_path, a_tar=make_tar(MEMBERS)[:700], b_tar=b"no tar", c_tar=make_tar(MEMBERS))
    result = label(run_config(tmp_path, KEEP))
    assert {row.uri[-5:] for row in result.totals.unreadable} == {"a.tar", "b.tar"}
    assert not result.totals.damaged
    again = label(run_config(tmp_path, KEEP))
    assert (again.plan.shards, len(again.plan.skipped)) == ([], 2)
    assert record_of(again)["status"] == "incomplete"


def test_keep_labels_what_an_earlier_run_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, a_tar=make_tar(MEMBERS)[:4000], b_tar=b"no tar", c_tar=make_tar(MEMBERS))
    Storage().write(f"{tmp_path}/in/d: after e.tar", b"no tar")
    for _ in range(2):
        skipped = label(run_config(tmp_path))
        assert row_of(skipped, "a.tar").readable_rows == 1
        assert row_of(skipped, "b.tar").readable_rows is None
        print_result(skipped)
        assert "set input.on_damaged_shard: keep" in capsys.readouterr().err
    result = label(run_config(tmp_path, KEEP))
    assert [shard.uri[-5:] for shard in result.plan.shards] == ["a.tar"]
    assert [row.uri[-5:] for row in result.totals.damaged] == ["a.tar"]
    assert record_of(result)["recovered"] == [f"{tmp_path}/in/a.tar"]
    row = row_of(result, "a.tar")
    assert (row.error, row.failed_version, row.damage is None) == (None, None, False)
    again = label(run_config(tmp_path, KEEP))
    assert again.plan.shards == []
    print_result(again)
    assert "set input.on_damaged_shard: keep" not in capsys.readouterr().err


@pytest.mark.parametrize("settings", [[], [KEEP]])
def test_replaced_file_and_retry_are_remedies_that_each_message_names(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, a_tar=make_tar(MEMBERS)[:4000], b_tar=b"no tar", c_tar=make_tar(MEMBERS))
    label(run_config(tmp_path, *settings))
    print_result(label(run_config(tmp_path, *settings)))
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("replace the file or use --retry-errors") == 1 + len(settings)
    retried = plan_run(run_config(tmp_path, *settings), Selection(retry_errors=True)).plan
    assert [shard.uri[-5:] for shard in retried.shards] == ["a.tar", "b.tar"]
    put(tmp_path, a_tar=make_tar(MEMBERS), b_tar=make_tar(MEMBERS))
    assert label(run_config(tmp_path, *settings)).is_complete


def test_retry_without_keep_preserves_the_labels_of_the_readable_part(tmp_path: Path) -> None:
    put(tmp_path, a_tar=make_tar(MEMBERS)[:4000], c_tar=make_tar(MEMBERS))
    kept = keys(label(run_config(tmp_path, KEEP)), "a.tar")
    result = label(run_config(tmp_path), Selection(retry_errors=True))
    row = row_of(result, "a.tar")
    assert row.error is not None
    assert row.damage is not None
    assert keys(result, "a.tar") == kept
    again = label(run_config(tmp_path, KEEP))
    assert [shard.uri[-5:] for shard in again.plan.shards] == ["a.tar"]
    assert row_of(again, "a.tar").error is None


def test_ends_of_tars_are_labeled_or_reported(tmp_path: Path) -> None:
    fields = f"input.uri={case_input('tar-ends')}"
    result = label(run_config(tmp_path, fields, KEEP))
    found = {row.uri.rpartition("/")[2]: row for row in manifest_rows(result.partition.manifest)}
    whole = {"a.tar": 1, "b.tar": 1, "dashA.tar": 2, "dashr.tar": 2, "one_block.tar": 1}
    assert {name: row.rows for name, row in found.items()} == whole | {"no_end.tar": 1, "cat.tar": 1}
    assert {name for name, row in found.items() if row.damage} == {"no_end.tar", "cat.tar"}
    assert "concatenated without tar -A" in (found["cat.tar"].damage or "")


def test_merged_images_are_counted_and_the_setting_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = f"input.uri={case_input('dots-in-names')}"
    result = label(run_config(tmp_path, fields))
    assert record_of(result)["counts"]["merged_images"] == 2
    assert result.is_complete
    print_result(result)
    assert "merged: 2 more images in the same samples; set input.key: last-dot" in capsys.readouterr().err
    each = label(run_config(tmp_path, fields, "input.key=last-dot"))
    assert (each.totals.images, each.totals.errors, each.totals.merged_images) == (8, 0, 0)
    assert each.partition.uri != result.partition.uri


# What is no damage -------------------------------------------------------------------------------


def test_object_that_changes_while_it_is_read_is_not_damaged(tmp_path: Path) -> None:
    tar = make_tar([(f"{i}.jpg", bytes(3_000_000)) for i in range(9)])
    info = Storage().write(f"{tmp_path}/x.tar", tar)
    shard = Shard(info.uri, info.version, "webdataset", info.size)
    samples = read_samples(Storage(), shard, read_options(on_damaged_shard="keep"))
    next(samples)
    Path(tmp_path, "x.tar").write_bytes(tar[:15_000_000])
    with pytest.raises(ShardError, match=r"after \d+ samples?") as caught:
        list(samples)
    assert not caught.value.keep


def test_storage_failure_is_not_damage(
    bucket: str, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 0.01)
    data = make_tar([(f"{i}.jpg", random.Random(i).randbytes(3_000_000)) for i in range(9)])
    info = Storage().write(f"{bucket}/in/x.tar", data)
    shard = Shard(info.uri, info.version, "webdataset", info.size)
    options = read_options(on_damaged_shard="keep", concurrent_fetches=1)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        samples = read_samples(Storage(endpoint_url=proxy.url), shard, options)
        next(samples)
        proxy.always("error")
        *_, last = split_into_chunks(samples, 0, 9, 10**9)
    assert (last.damage, last.transient) == (None, True)
    assert ": after " in (last.error or "")


# Recovery ----------------------------------------------------------------------------------------


def test_rebuild_and_recovery_keep_the_damage(tmp_path: Path) -> None:
    put(tmp_path, a_tar=make_tar(MEMBERS)[:4000], c_tar=make_tar(MEMBERS))
    label(run_config(tmp_path))
    result = label(run_config(tmp_path, KEEP))
    stored = [replace(row, run=None, committed_at=None) for row in manifest_rows(result.partition.manifest)]
    assert stored[0].damage is not None
    assert rebuilt_rows(result.partition) == stored
    Storage().delete(result.partition.manifest.uri)
    again = label(run_config(tmp_path, KEEP))
    assert not again.is_complete
    assert row_of(again, "a.tar").damage == stored[0].damage


class _KeepPlace(Place):
    def fields(self) -> list[str]:
        return [*super().fields(), KEEP]


@pytest.mark.slow
@pytest.mark.parametrize("skipped_before", [False, True])
def test_run_killed_at_any_write_keeps_the_damage(
    tmp_path: Path, skipped_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease.LeaseContent, "is_live", False)  # no wait for the leases of killed runs
    place = _KeepPlace(str(tmp_path))
    tar = make_tar(MEMBERS)
    place.put("in", {"a.tar": tar, "b.tar": tar[:4000], "c.tar": tar[:6000], "d.tar": b"no tar"})
    if skipped_before:
        Place(place.root).run()
    states = place.recorded()
    end, labels = place.end_state(), place.labels()
    [rows] = [rows for name, rows in end.items() if name == "manifest.parquet"]
    assert [row["damage"] is not None for row in rows] == [False, True, True, False]
    for state in states:
        place.restore(state)
        for uri, found in place.labels().items():
            assert found == labels[uri]
        place.run()
        assert place.end_state() == end
