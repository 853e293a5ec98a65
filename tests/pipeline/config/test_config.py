from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config import (
    Config,
    ConfigError,
    ScheduleConfig,
    TrainConfig,
    load_config,
)
from pipeline.run import make_job

MINIMAL = """\
input:
  uri: s3://bucket/shards
model:
  path: fashion-mnist
output:
  uri: s3://bucket/labels
"""

#: The digest of the bundled checkpoint, when these fingerprints were taken.
BUNDLED_DIGEST = "295007f85eada3df2861fd26a84b710441b2c71967570740870bd920019d29ba"

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Config, write(folder, text), overrides)
    return str(caught.value)


def test_a_minimal_file_has_the_documented_defaults(tmp_path: Path) -> None:
    config = load_config(Config, write(tmp_path, MINIMAL))
    assert config.input.format == "auto"
    assert config.output.topk == 5
    assert config.output.embedding == "none"
    assert config.model.precision == "fp32"


def test_an_unknown_field_is_refused_with_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "  topkk: 3\n")
    assert "job.yaml" in message
    assert "line 7: output.topkk: unknown field" in message


def test_an_ill_typed_field_is_refused_with_its_line_and_value(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "  topk: five\n")
    assert "line 7: output.topk" in message
    assert "'five'" in message


def test_a_number_is_not_taken_for_text_nor_text_for_a_number(tmp_path: Path) -> None:
    assert "output.topk" in refusal(tmp_path, MINIMAL + "  topk: '5'\n")
    assert "model.path" in refusal(tmp_path, MINIMAL, "model.path=13")


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    assert "output: required, but missing" in refusal(tmp_path, MINIMAL.partition("output")[0])


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "  topk: 0\n  embedding: int8\n")
    assert "output.topk" in message
    assert "output.embedding" in message


def test_a_field_that_stands_twice_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "input:\n  uri: s3://other\n")
    assert 'line 7: found duplicate key "input"' in message
    assert "s3://other" not in message


def test_text_that_is_not_yaml_is_refused_by_file(tmp_path: Path) -> None:
    assert "job.yaml: not valid YAML" in refusal(tmp_path, "input: [")


@pytest.mark.parametrize("text", ["input: !python x", "? [a]\n: b", "input: 2024-13-45", "a: &x {b: *x}"])
def test_yaml_that_makes_no_plain_values_is_refused_by_file(tmp_path: Path, text: str) -> None:
    assert "job.yaml" in refusal(tmp_path, text)


def test_a_secret_in_an_endpoint_is_refused_and_not_repeated(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL, "storage.endpoint_url=http://me:hunter2@host:9000")
    assert "storage.endpoint_url: credentials don't belong here" in message
    assert "hunter2" not in message


def test_a_file_that_is_a_list_is_refused(tmp_path: Path) -> None:
    assert "holds a list" in refusal(tmp_path, "- input")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_config(Config, tmp_path / "none.yaml")


def test_overrides_set_fields_in_order_and_read_values_as_yaml(tmp_path: Path) -> None:
    config = load_config(
        Config,
        write(tmp_path, MINIMAL),
        ["output.topk=3", "output.topk=2", "input.labels=false", "storage.region=null"],
    )
    assert config.output.topk == 2
    assert config.input.labels is False
    assert config.storage.region is None


@pytest.mark.parametrize("override", ["output.topk", "=3", "output..topk=3", "input.uri.x=3"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    assert override in refusal(tmp_path, MINIMAL, override)


def test_a_fault_of_an_override_is_blamed_on_no_line_of_the_file(tmp_path: Path) -> None:
    assert "  output.topk: " in refusal(tmp_path, MINIMAL, "output.topk=no")
    path = write(tmp_path, "defaults: {cron: '@daily'}\ndatasets: {a: {}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(ScheduleConfig, path, ["datasets.a.cron=never"])
    assert "  datasets.a.cron: not a cron" in str(caught.value)


def test_plain_addresses_of_clusters_and_services_are_taken(tmp_path: Path) -> None:
    for address in ("127.0.0.1:6379", "ray://head:10001", "auto"):
        assert (
            load_config(Config, write(tmp_path, MINIMAL), [f"ray.address={address}"]).ray.address == address
        )
    endpoint = "http://127.0.0.1:8333"
    found = load_config(Config, write(tmp_path, MINIMAL), [f"storage.endpoint_url={endpoint}"])
    assert found.storage.endpoint_url == endpoint


def test_a_value_that_is_shown_holds_no_secret(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL, "input.uri=['s3://key:planted@b/x', 'https://h/x?sig=planted']")
    assert "input.uri" in message
    assert "planted" not in message


@pytest.mark.parametrize(
    "override",
    [
        "input.uri=s3://KEY:xq1/xq2@bucket/x",
        "input.uri=https://host/x#xq1xq2",
        "output.uri=gs://xq1xq2@bucket/x",
        "storage.endpoint_url=http://KEY:xq1/xq2@host:9000",
        "storage.endpoint_url=http://host:9000/?token=xq1xq2",
        "storage.endpoint_url=http://host:xq1",
        "ray.address=ray://user:xq1/xq2@host:10001",
    ],
)
def test_credentials_in_an_address_are_refused_without_showing_them(tmp_path: Path, override: str) -> None:
    message = refusal(tmp_path, MINIMAL, override)
    assert override.partition("=")[0] in message
    for part in ("xq1", "xq2"):
        assert part not in message


def test_an_override_of_an_unknown_field_is_refused(tmp_path: Path) -> None:
    assert "output.topkk: unknown field" in refusal(tmp_path, MINIMAL, "output.topkk=3")


def test_actor_bounds_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL, "classify.min_actors=3", "classify.max_actors=2")
    assert "max_actors 2 is below min_actors 3" in message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_that_comes_with_the_project_is_valid(path: Path) -> None:
    kind = {"schedule": ScheduleConfig, "fashion_mnist_train": TrainConfig}.get(path.stem, Config)
    assert load_config(kind, path)


def test_an_empty_section_is_a_section_and_numbers_may_have_exponents(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("input: {uri: in}\nmodel: {path: m}\noutput: {uri: out}\nstorage:\n  # nothing\n")
    config = load_config(
        Config, file, ["storage.region=x", "run.lease_duration_s=6e1", "run.flush_interval_s=1.5e-1"]
    )
    assert (config.storage.region, config.run.lease_duration_s, config.run.flush_interval_s) == (
        "x",
        60,
        0.15,
    )
    assert load_config(Config, file).storage.region is None


@pytest.mark.parametrize(
    "url", ["http://u:SECRET@host", "http://u:SECRET@[::1", "https://host/?X-Amz-Signature=SECRET"]
)
def test_an_endpoint_with_a_secret_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"storage\.endpoint_url") as caught:
        load_config(
            Config, None, ["input.uri=a", "model.path=b", "output.uri=c", f"storage.endpoint_url={url}"]
        )
    assert "SECRET" not in str(caught.value)


def test_automatic_precision_needs_to_know_the_device() -> None:
    fields = ["input.uri=/in", "output.uri=/out", "model.path=fashion-mnist", "model.precision=auto"]
    with pytest.raises(ConfigError, match=r"'auto' needs classify.device to be cpu or cuda"):
        load_config(Config, None, fields)
    openvino = ["classify.runtime=openvino", "classify.device=cuda"]
    with pytest.raises(ConfigError, match=r"\n  classify\.runtime: 'openvino' is for CPUs"):
        load_config(Config, None, [*fields[:3], *openvino])
    partitions = {
        device: make_job(load_config(Config, None, [*fields, f"classify.device={device}"])).partition.uri
        for device in ("cpu", "cuda")
    }
    said = {
        precision: make_job(
            load_config(Config, None, [*fields[:3], f"model.precision={precision}"])
        ).partition.uri
        for precision in ("fp32", "bf16")
    }
    assert partitions == {"cpu": said["fp32"], "cuda": said["bf16"]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decode.device=auto"], "decode.device: 'auto' needs classify.device to be cpu or cuda"),
        (["decode.device=gpu"], "decode.device: 'gpu' needs classify.device 'cuda', and it is 'auto'"),
        (["decode.device=gpu", "classify.device=cpu"], "needs classify.device 'cuda', and it is 'cpu'"),
        (
            ["decode.device=auto", "classify.device=cuda", "decode.quality=fast"],
            "decode.quality: 'fast' is for the CPU",
        ),
    ],
)
def test_a_decoder_that_can_not_be_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(tmp_path, MINIMAL, *overrides)


@pytest.mark.parametrize(
    ("decode", "classify", "resolved"),
    [("cpu", "cuda", "cpu"), ("auto", "cpu", "cpu"), ("auto", "cuda", "gpu"), ("gpu", "cuda", "gpu")],
)
def test_what_decodes_is_known_before_the_cluster_is(
    tmp_path: Path, decode: str, classify: str, resolved: str
) -> None:
    overrides = [f"decode.device={decode}", f"classify.device={classify}"]
    config = load_config(Config, write(tmp_path, MINIMAL), overrides)
    assert config.decode.device == resolved


def test_the_record_of_a_run_is_its_configuration(tmp_path: Path) -> None:
    config = load_config(Config, write(tmp_path, MINIMAL), ["output.topk=7"])
    record = {"run": "20260101T000000Z-abc", "status": "complete", "config": config.model_dump()}
    text = json.dumps(record | {"fingerprint": "ab", "versions": {"ray": "2.60.0"}}, indent=2)
    assert load_config(Config, write(tmp_path, text)) == config
    assert load_config(Config, write(tmp_path, text), ["output.topk=3"]).output.topk == 3
    message = refusal(tmp_path, text.replace('"topk": 7', '"topk": "seven"'))
    line = next(n for n, content in enumerate(text.splitlines(), 1) if '"topk"' in content)
    assert f"line {line}: output.topk" in message


@pytest.mark.parametrize(
    ("override", "model"),
    [
        ("output.topk=2", ("org/m", "abc")),
        ("model.path=other/m", ("other/m", None)),
        ("model={path: other/m}", ("other/m", None)),
        ("model.revision=v2", ("org/m", "v2")),
        ("model.path=org/m", ("org/m", "abc")),
    ],
)
def test_recorded_commit_is_that_of_the_recorded_model(
    tmp_path: Path, override: str, model: tuple[str, str | None]
) -> None:
    config = load_config(Config, None, ["input.uri=/in", "output.uri=/out", "model.path=org/m"])
    record = {"run": "r", "fingerprint": "f", "model_commit": "abc", "config": config.model_dump()}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    loaded = load_config(Config, path, [override])
    assert (loaded.model.path, loaded.model.revision) == model
    with pytest.raises(ConfigError, match="model"):
        load_config(Config, path, ["model=x"])


def test_fingerprint_is_a_fixed_function_of_settings_and_checkpoint(tmp_path: Path) -> None:
    """Another value would give existing partitions other names."""
    config = load_config(Config, write(tmp_path, MINIMAL))
    expected = "ef89a5a52571e3c84bf2c5d81cea236e80e5503e4849b87fbbee0e8b214c9c3e"
    assert config.fingerprint(BUNDLED_DIGEST) == expected
    other = [
        "decode.device=auto",
        "classify.device=cuda",
        "output.embedding=float16",
        "input.label_field=a.b",
    ]
    config = load_config(Config, write(tmp_path, MINIMAL), other)
    expected = "0c0d5b3d876ddf1303f8565d11f8a470ab403343689d6a8defd705c00e06975e"
    assert config.fingerprint(BUNDLED_DIGEST) == expected


def test_settings_of_a_label_name_no_place_and_no_share_of_the_work(tmp_path: Path) -> None:
    settings = load_config(Config, write(tmp_path, MINIMAL)).label_settings
    for same in ("input.uri=/in", "output.uri=/out", "classify.batch_size=3", "classify.device=cpu"):
        assert load_config(Config, write(tmp_path, MINIMAL), [same]).label_settings == settings
    for other in ("output.topk=3", "model.precision=bf16", "decode.quality=fast", "input.labels=false"):
        assert load_config(Config, write(tmp_path, MINIMAL), [other]).label_settings != settings


@pytest.mark.parametrize(
    ("given", "normalized"),
    [("s3://b/x/", "s3://b/x"), ("file:///a/../b", "/b"), ("/a//b/", "/a/b"), ("x", str(Path.cwd() / "x"))],
)
def test_a_place_has_one_spelling_once_loaded(tmp_path: Path, given: str, normalized: str) -> None:
    config = load_config(Config, write(tmp_path, MINIMAL), [f"input.uri={given}", f"output.uri={given}"])
    assert config.input.uri == config.output.uri == normalized


def test_a_uri_without_a_bucket_is_refused(tmp_path: Path) -> None:
    assert "input.uri: names no bucket" in refusal(tmp_path, MINIMAL, "input.uri=s3://")


def test_yaml_is_1_2_whose_only_booleans_are_true_and_false(tmp_path: Path) -> None:
    assert "input.labels" in refusal(tmp_path, MINIMAL, "input.labels=no")
    assert load_config(Config, write(tmp_path, MINIMAL), ["input.key_column=on"]).input.key_column == "on"


def test_a_schedule_without_croniter_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "croniter", None)
    with pytest.raises(ConfigError, match=r"pip install 'cvt-label\[schedule\]'"):
        load_config(ScheduleConfig, CONFIGS[0].parent / "schedule.yaml")


def test_the_clusters_file_shows_every_field() -> None:
    shown = yaml.safe_load((CONFIGS[0].parent / "gpu_cluster.yaml").read_text())
    whole = load_config(Config, CONFIGS[0].parent / "gpu_cluster.yaml").model_dump()
    assert {name: set(section) for name, section in shown.items()} == {
        name: set(section) for name, section in whole.items()
    }


@pytest.mark.parametrize("uri", ["s3://b/in/", "/data/./in/", "file:///data/in"])
def test_places_have_one_spelling(uri: str) -> None:
    loaded = load_config(Config, None, [f"input.uri={uri}", f"output.uri={uri}", f"model.path={uri}"])
    expected = "s3://b/in" if uri.startswith("s3") else "/data/in"
    assert [loaded.input.uri, loaded.output.uri, loaded.model.path] == [expected] * 3


def test_relative_paths_are_made_absolute_unless_they_are_for_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = ["input.uri=in/", "output.uri=s3://b/out/", "model.path=fashion-mnist"]
    loaded = load_config(Config, None, fields)
    assert (loaded.input.uri, loaded.model.path) == (str(tmp_path / "in"), "fashion-mnist")
    sent = load_config(Config, None, fields, keep_relative_paths=True)
    assert (sent.input.uri, sent.output.uri) == ("in/", "s3://b/out")
