"""The configuration of a schedule: defaults of datasets, and error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import ConfigError, ScheduleConfig, load_config
from tests.pipeline.schedule.lists import DATASET, LIST
from tests.ray_head import REPOSITORY


def test_fields_of_a_dataset_override_the_defaults() -> None:
    config = load_config(ScheduleConfig, REPOSITORY / "configs" / "schedule.yaml")
    products, reviews = config.datasets["products"], config.datasets["reviews"]
    assert (products.model.path, products.model.precision) == ("microsoft/cvt-13", "bf16")
    assert (reviews.model.path, reviews.model.precision) == ("microsoft/cvt-21", "bf16")
    assert (str(products.timezone), str(reviews.timezone)) == ("Europe/Berlin", "UTC")
    assert reviews.job.input.format == "parquet"
    assert reviews.job.classify.device == "cuda"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("input:", "inputs:"), "line 6: datasets.a.inputs: unknown field; did you mean `input`?"),
        (
            ("model: {path", "model: {pathh"),
            "line 4: datasets.a.model.pathh: unknown field; did you mean `path`?",
        ),
        (
            ("submit: {", "submit: {adress: x, "),
            "line 1: submit.adress: unknown field; did you mean `address`?",
        ),
        (("http://", "http://user:password@"), "must not contain credentials"),
        (("0 * * * *", "0 * * *"), "line 3: datasets.a.cron: "),
        (("0 * * * *", "R * * * *"), "line 3: datasets.a.cron: "),
        (("0 * * * *", "0 0 31 2 *"), "line 3: datasets.a.cron: "),
        (
            ("defaults:", "defaults:\n  timezone: Berlin"),
            "datasets.a.timezone: must be an IANA time zone such as Europe/Berlin, not 'Berlin'",
        ),
        (("defaults:", "defaults:\n  timezone: ''"), "must be an IANA time zone such as Europe/Berlin"),
        (("  a:", "  ../a:"), "datasets.../a: the name must match pattern '^[A-Za-z0-9]"),
    ],
)
def test_invalid_schedule_is_reported_with_file_line_and_field(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    text = LIST.format(address="http://head:8265", python="python") + DATASET.format(name="a", folder="/x")
    path = tmp_path / "schedule.yaml"
    path.write_text(text)
    load_config(ScheduleConfig, path)
    assert text.count(change[0]) == 1
    path.write_text(text.replace(*change))
    with pytest.raises(ConfigError) as caught:
        load_config(ScheduleConfig, path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "password" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("datasets.a.cron=never", "expected a cron expression of five fields"),
        ("datasets.a.output.topk=x", "must be a valid integer"),
        ("datasets.a.model.pathh=x", "unknown field; did you mean `path`?"),
        ("defaults.output.topk=x", "datasets.a.output.topk: must be a valid integer"),
        ("submit.poll_interval_s=0", "must be greater than 0"),
    ],
)
def test_error_of_an_override_is_reported_as_the_options(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text(
        LIST.format(address="http://head:8265", python="python") + DATASET.format(name="a", folder="/x")
    )
    with pytest.raises(ConfigError) as caught:
        load_config(ScheduleConfig, path, [override])
    assert str(caught.value).startswith(f"--set {override}: {message}")
