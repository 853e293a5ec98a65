from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import (
    ClassifyConfig,
    Config,
    ConfigError,
    InputConfig,
    ScheduleConfig,
    TrainConfig,
    load_config,
)
from pipeline.config.base import Section
from pipeline.run import make_job

MINIMAL = """\
input:
  uri: s3://bucket/shards
model:
  path: fashion-mnist
output:
  uri: s3://bucket/labels
"""

#: The digest of the bundled checkpoint for which the expected fingerprints were computed.
BUNDLED_DIGEST = "295007f85eada3df2861fd26a84b710441b2c71967570740870bd920019d29ba"

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def error_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Config, write(folder, text), overrides)
    return str(caught.value)


def test_minimal_file_has_documented_defaults(tmp_path: Path) -> None:
    config = load_config(Config, write(tmp_path, MINIMAL))
    assert config.input.format == "auto"
    assert config.output.topk == 5
    assert config.output.embedding == "none"
    assert config.model.precision == "fp32"


def test_unknown_field_is_reported_with_line(tmp_path: Path) -> None:
    message = error_of(tmp_path, MINIMAL + "  topkk: 3\n")
    assert "job.yaml" in message
    assert "line 7: output.topkk: unknown field; did you mean `topk`?" in message


def test_field_of_wrong_type_is_reported_with_line_and_value(tmp_path: Path) -> None:
    message = error_of(tmp_path, MINIMAL + "  topk: five\n")
    assert "line 7: output.topk" in message
    assert "'five'" in message


def test_numbers_and_text_are_not_converted(tmp_path: Path) -> None:
    assert "output.topk" in error_of(tmp_path, MINIMAL + "  topk: '5'\n")
    assert "model.path" in error_of(tmp_path, MINIMAL, "model.path=13")


def test_missing_field_is_named(tmp_path: Path) -> None:
    assert "output: required, but missing" in error_of(tmp_path, MINIMAL.partition("output")[0])


def test_all_errors_are_listed_at_once(tmp_path: Path) -> None:
    message = error_of(tmp_path, MINIMAL + "  topk: 0\n  embedding: int8\n")
    assert "output.topk" in message
    assert "output.embedding" in message


def test_duplicate_field_is_rejected(tmp_path: Path) -> None:
    message = error_of(tmp_path, MINIMAL + "input:\n  uri: s3://other\n")
    assert 'line 7: found duplicate key "input"' in message
    assert "s3://other" not in message


def test_invalid_yaml_is_reported_with_file(tmp_path: Path) -> None:
    assert "job.yaml: not valid YAML" in error_of(tmp_path, "input: [")


@pytest.mark.parametrize("text", ["input: !python x", "? [a]\n: b", "input: 2024-13-45", "a: &x {b: *x}"])
def test_yaml_without_plain_values_is_reported_with_file(tmp_path: Path, text: str) -> None:
    assert "job.yaml" in error_of(tmp_path, text)


def test_secret_in_endpoint_is_rejected_and_not_shown(tmp_path: Path) -> None:
    message = error_of(tmp_path, MINIMAL, "storage.endpoint_url=http://me:hunter2@host:9000")
    assert "storage.endpoint_url: must not contain credentials" in message
    assert "hunter2" not in message


def test_file_with_a_list_is_rejected(tmp_path: Path) -> None:
    assert "expected a mapping of sections, found a list" in error_of(tmp_path, "- input")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_config(Config, tmp_path / "none.yaml")


def test_overrides_apply_in_order_with_yaml_values(tmp_path: Path) -> None:
    config = load_config(
        Config,
        write(tmp_path, MINIMAL),
        ["output.topk=3", "output.topk=2", "input.labels=false", "storage.region=null"],
    )
    assert config.output.topk == 2
    assert config.input.labels is False
    assert config.storage.region is None


@pytest.mark.parametrize("override", ["output.topk", "=3", "output..topk=3", "input.uri.x=3"])
def test_malformed_override_is_rejected(tmp_path: Path, override: str) -> None:
    assert override in error_of(tmp_path, MINIMAL, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inputt: {}\n", "line 7: inputt: unknown field; did you mean `input`?"),
        ("  url: x\n", "line 7: output.url: unknown field; did you mean `uri`?"),
        (
            "classify:\n  max_actor: 2\n",
            "line 8: classify.max_actor: unknown field; did you mean `max_actors`?",
        ),
        (
            "storage:\n  xyz: 2\n",
            "line 8: storage.xyz: unknown field; known fields: endpoint_url, region, "
            "anonymous, requester_pays, request_timeout_s, min_bytes_per_s, conditional_writes",
        ),
    ],
)
def test_unknown_field_gets_a_suggestion_from_its_section(tmp_path: Path, text: str, message: str) -> None:
    assert error_of(tmp_path, MINIMAL + text) == f"{tmp_path}/job.yaml:\n  {message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output.topk=x", "must be a valid integer"),
        ("output.topkk=3", "unknown field; did you mean `topk`?"),
        ("outputs.topk=3", "outputs: unknown field; did you mean `output`?"),
        ("model={path: 3}", "model.path: must be text"),
        ("model={}", "model.path: required, but missing"),
        ("decode.device=gpu", "'gpu' needs classify.device 'cuda', not 'auto'"),
    ],
)
def test_error_of_an_override_is_reported_as_the_options(tmp_path: Path, override: str, message: str) -> None:
    assert error_of(tmp_path, MINIMAL, override) == f"--set {override}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("read: 3", "read: must be a section with fields, not 3"),
        ("storage: s3", "storage: must be a section with fields, not 's3'"),
        ("read: {concurrency: 2.5}", "read.concurrency: must be a valid integer, not 2.5"),
        ("read: {concurrency: true}", "read.concurrency: must be a valid integer, not true"),
        ("read: {num_cpus: x}", "read.num_cpus: must be a valid number, not 'x'"),
        ("read: {num_cpus: .inf}", "read.num_cpus: must be a finite number, not inf"),
        ("input: {uri: /in, labels: 1}", "input.labels: must be true or false, not 1"),
        ("input: {uri: /in, labels: yes}", "input.labels: must be true or false, not 'yes'"),
        ("model: {path: null}", "model.path: must be text, not null"),
        ("output: {uri: ''}", "output.uri: must not be empty"),
        ("decode: {quality: best}", "decode.quality: must be 'exact' or 'fast', not 'best'"),
        ("report: {gallery: 21}", "report.gallery: must be less than or equal to 20, not 21"),
        ("gate: {max_js: 0}", "gate.max_js: must be greater than 0, not 0"),
    ],
)
def test_invalid_value_is_described_in_plain_words(tmp_path: Path, text: str, message: str) -> None:
    sections = {"input": "{uri: /in}", "model": "{path: fashion-mnist}", "output": "{uri: /out}"}
    name, _, section = text.partition(": ")
    lines = [f"{each}: {value}" for each, value in (sections | {name: section}).items()]
    found = error_of(tmp_path, "\n".join(lines)).splitlines()[1]
    assert re.sub(r"^  line \d: ", "", found).startswith(message)


def test_errors_of_file_and_overrides_are_reported_separately(tmp_path: Path) -> None:
    assert error_of(tmp_path, MINIMAL + "  topk: 0\n", "run.grace_period_s=x") == (
        f"{tmp_path}/job.yaml:\n"
        "  line 7: output.topk: must be greater than or equal to 1, not 0\n"
        "--set run.grace_period_s=x: must be a valid number"
    )


def test_later_override_replaces_an_invalid_one(tmp_path: Path) -> None:
    assert load_config(Config, write(tmp_path, MINIMAL), ["output.topk=x", "output.topk=3"]).output.topk == 3


@pytest.mark.parametrize(
    "override",
    [
        "storage.endpoint_url=http://me:planted@host",
        "input.uri.x=s3://me:planted@b",
        "input.uri=[s3://a:planted@b]",
    ],
)
def test_error_of_an_override_shows_no_secret(tmp_path: Path, override: str) -> None:
    message = error_of(tmp_path, MINIMAL, override)
    assert message.startswith(f"--set {override.partition('=')[0]}")
    assert "planted" not in message


def test_addresses_without_credentials_are_accepted(tmp_path: Path) -> None:
    for address in ("127.0.0.1:6379", "ray://head:10001", "auto"):
        assert (
            load_config(Config, write(tmp_path, MINIMAL), [f"ray.address={address}"]).ray.address == address
        )
    endpoint = "http://127.0.0.1:8333"
    found = load_config(Config, write(tmp_path, MINIMAL), [f"storage.endpoint_url={endpoint}"])
    assert found.storage.endpoint_url == endpoint


def test_value_in_error_message_has_no_secret(tmp_path: Path) -> None:
    message = error_of(tmp_path, MINIMAL, "input.uri=['s3://key:planted@b/x', 'https://h/x?sig=planted']")
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
def test_credentials_in_address_are_rejected_and_not_shown(tmp_path: Path, override: str) -> None:
    message = error_of(tmp_path, MINIMAL, override)
    assert override.partition("=")[0] in message
    for part in ("xq1", "xq2"):
        assert part not in message


def test_override_of_unknown_field_is_rejected(tmp_path: Path) -> None:
    assert "--set output.topkk=3: unknown field" in error_of(tmp_path, MINIMAL, "output.topkk=3")


def test_max_actors_below_min_actors_is_rejected(tmp_path: Path) -> None:
    message = error_of(tmp_path, MINIMAL, "classify.min_actors=3", "classify.max_actors=2")
    assert "max_actors 2 is below min_actors 3" in message


def test_pools_have_the_fields_of_their_section(tmp_path: Path) -> None:
    text = MINIMAL + "classify:\n  device: cuda\n  max_actors: 4\n  label_selector: {zone: a}\n  pools:\n"
    text += "  - {gpu: L4, batch_size: 256}\n  - {device: cpu, max_actors: 2, label_selector: {}}\n"
    gpu, cpu = load_config(Config, write(tmp_path, text)).classify.each_pool
    assert (gpu.device, gpu.max_actors, gpu.batch_size) == ("cuda", 4, 256)
    assert gpu.label_selector == {"zone": "a", "ray.io/accelerator-type": "L4"}
    assert (cpu.device, cpu.max_actors, cpu.batch_size, cpu.label_selector) == ("cpu", 2, None, {})
    assert gpu.timeout_s == cpu.timeout_s == ClassifyConfig().timeout_s


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["classify.pools=[{gpu: L4}, {devise: cpu}]"], "classify.pools.1.devise: unknown field"),
        (["classify.pools=[{device: cpu, max_actors: 0}]"], "classify.pools.0.max_actors: "),
        (["classify.min_actors=3", "classify.pools=[{max_actors: 2}]"], "max_actors 2 is below min_actors 3"),
        (["classify.pools=[{gpu: L4, runtime: openvino}]"], "needs classify.device 'cpu', not 'cuda'"),
        (
            ["decode.device=gpu", "classify.device=cuda", "classify.pools=[{gpu: L4}, {device: cpu}]"],
            "'gpu' needs classify.device 'cuda', not 'cpu'",
        ),
        (["model.precision=fp16", "classify.pools=[{gpu: L4}, {runtime: openvino}]"], "'openvino' supports "),
        (["ray.label_selector={zone: 'a b'}"], "ray.label_selector.zone: "),
    ],
)
def test_impossible_pools_are_rejected(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in error_of(tmp_path, MINIMAL, *overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_example_configuration_is_valid(path: Path) -> None:
    kinds: dict[str, type[Section]] = {"schedule": ScheduleConfig, "fashion_mnist_train": TrainConfig}
    assert load_config(kinds.get(path.stem, Config), path)


def test_empty_section_and_numbers_with_exponents_are_valid(tmp_path: Path) -> None:
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
def test_endpoint_with_secret_is_rejected_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match=r"storage\.endpoint_url") as caught:
        load_config(
            Config, None, ["input.uri=a", "model.path=b", "output.uri=c", f"storage.endpoint_url={url}"]
        )
    assert "SECRET" not in str(caught.value)


def test_automatic_precision_requires_a_device() -> None:
    fields = ["input.uri=/in", "output.uri=/out", "model.path=fashion-mnist", "model.precision=auto"]
    with pytest.raises(ConfigError, match=r"'auto' needs classify.device to be cpu or cuda"):
        load_config(Config, None, fields)
    openvino = ["classify.runtime=openvino", "classify.device=cuda"]
    with pytest.raises(ConfigError, match=r"--set classify\.runtime=openvino: 'openvino' needs classify"):
        load_config(Config, None, [*fields[:3], *openvino])
    partitions = {
        device: make_job(load_config(Config, None, [*fields, f"classify.device={device}"])).partition.uri
        for device in ("cpu", "cuda")
    }
    explicit = {
        precision: make_job(
            load_config(Config, None, [*fields[:3], f"model.precision={precision}"])
        ).partition.uri
        for precision in ("fp32", "bf16")
    }
    assert partitions == {"cpu": explicit["fp32"], "cuda": explicit["bf16"]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decode.device=auto"], "decode.device=auto: 'auto' needs classify.device to be cpu or cuda"),
        (["decode.device=gpu"], "decode.device=gpu: 'gpu' needs classify.device 'cuda', not 'auto'"),
        (["decode.device=gpu", "classify.device=cpu"], "needs classify.device 'cuda', not 'cpu'"),
        (
            ["decode.device=auto", "classify.device=cuda", "decode.quality=fast"],
            "decode.quality=fast: 'fast' needs decode.device 'cpu'",
        ),
        (["decode.cpu_share=0.2"], "decode.cpu_share=0.2: 0.2 needs decode.device 'gpu'"),
    ],
)
def test_impossible_decoder_is_rejected(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in error_of(tmp_path, MINIMAL, *overrides)


@pytest.mark.parametrize(
    ("decode", "classify", "resolved"),
    [("cpu", "cuda", "cpu"), ("auto", "cpu", "cpu"), ("auto", "cuda", "gpu"), ("gpu", "cuda", "gpu")],
)
def test_automatic_decoder_is_resolved_without_a_cluster(
    tmp_path: Path, decode: str, classify: str, resolved: str
) -> None:
    overrides = [f"decode.device={decode}", f"classify.device={classify}"]
    config = load_config(Config, write(tmp_path, MINIMAL), overrides)
    assert config.decode.device == resolved


def test_run_record_loads_as_configuration(tmp_path: Path) -> None:
    config = load_config(Config, write(tmp_path, MINIMAL), ["output.topk=7"])
    record = {"run": "20260101T000000Z-abc", "status": "complete", "config": config.model_dump()}
    text = json.dumps(record | {"fingerprint": "ab", "versions": {"ray": "2.60.0"}}, indent=2)
    assert load_config(Config, write(tmp_path, text)) == config
    assert load_config(Config, write(tmp_path, text), ["output.topk=3"]).output.topk == 3
    message = error_of(tmp_path, text.replace('"topk": 7', '"topk": "seven"'))
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
def test_recorded_commit_applies_to_recorded_model_only(
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


def test_fingerprint_depends_on_settings_and_checkpoint_only(tmp_path: Path) -> None:
    """With another value, existing partitions would get other names."""
    config = load_config(Config, write(tmp_path, MINIMAL))
    expected = "ce00efcf5bd9103400cba4c5fc4fc2a91f57d86a9690a8ca369ee96dea2c05cc"
    assert config.fingerprint(BUNDLED_DIGEST) == expected
    other = [
        "decode.device=auto",
        "classify.device=cuda",
        "output.embedding=float16",
        "input.label_field=a.b",
    ]
    config = load_config(Config, write(tmp_path, MINIMAL), other)
    expected = "6c0a73b14c8538a9cd61dc6d88fc1ba6bc90f5ed8d352782761c5a46259d86c7"
    assert config.fingerprint(BUNDLED_DIGEST) == expected


def test_label_settings_exclude_locations_and_resources(tmp_path: Path) -> None:
    settings = load_config(Config, write(tmp_path, MINIMAL)).label_settings
    limits = ("decode.timeout_s=3", "classify.timeout_s=3")
    for unrelated in (
        "input.uri=/in",
        "output.uri=/out",
        "classify.batch_size=3",
        "classify.device=cpu",
        *limits,
    ):
        assert load_config(Config, write(tmp_path, MINIMAL), [unrelated]).label_settings == settings
    for related in ("output.topk=3", "model.precision=bf16", "decode.quality=fast", "input.labels=false"):
        assert load_config(Config, write(tmp_path, MINIMAL), [related]).label_settings != settings


@pytest.mark.parametrize(
    ("given", "normalized"),
    [("s3://b/x/", "s3://b/x"), ("file:///a/../b", "/b"), ("/a//b/", "/a/b"), ("x", str(Path.cwd() / "x"))],
)
def test_loaded_uris_are_normalized(tmp_path: Path, given: str, normalized: str) -> None:
    config = load_config(Config, write(tmp_path, MINIMAL), [f"input.uri={given}", f"output.uri={given}"])
    assert config.input.uri == config.output.uri == normalized


def test_uri_without_bucket_is_rejected(tmp_path: Path) -> None:
    assert "input.uri: the URI has no bucket" in error_of(tmp_path, MINIMAL, "input.uri=s3://")


def test_yaml_1_2_booleans_are_true_and_false_only(tmp_path: Path) -> None:
    assert "input.labels" in error_of(tmp_path, MINIMAL, "input.labels=no")
    assert load_config(Config, write(tmp_path, MINIMAL), ["input.key_column=on"]).input.key_column == "on"


def test_schedule_without_croniter_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "croniter", None)
    with pytest.raises(ConfigError, match=r"pip install 'cvt-label\[schedule\]'"):
        load_config(ScheduleConfig, CONFIGS[0].parent / "schedule.yaml")


def test_gpu_cluster_file_has_every_field() -> None:
    shown = yaml.safe_load((CONFIGS[0].parent / "gpu_cluster.yaml").read_text())
    whole = load_config(Config, CONFIGS[0].parent / "gpu_cluster.yaml").model_dump()
    assert {name: set(section) for name, section in shown.items()} == {
        name: set(section) for name, section in whole.items()
    }


@pytest.mark.parametrize("uri", ["s3://b/in/", "/data/./in/", "file:///data/in"])
def test_input_output_and_model_uris_are_normalized(uri: str) -> None:
    loaded = load_config(Config, None, [f"input.uri={uri}", f"output.uri={uri}", f"model.path={uri}"])
    expected = "s3://b/in" if uri.startswith("s3") else "/data/in"
    assert [loaded.input.uri, loaded.output.uri, loaded.model.path] == [expected] * 3


def test_relative_paths_are_made_absolute_unless_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = ["input.uri=in/", "output.uri=s3://b/out/", "model.path=fashion-mnist"]
    loaded = load_config(Config, None, fields)
    assert (loaded.input.uri, loaded.model.path) == (str(tmp_path / "in"), "fashion-mnist")
    sent = load_config(Config, None, fields, keep_relative_paths=True)
    assert (sent.input.uri, sent.output.uri) == ("in/", "s3://b/out")


@pytest.mark.parametrize(
    "condition", ["[[split, '~', train]]", "[split, =, train]", "[[a, b]]", "[[a, [], 1]]"]
)
def test_invalid_filter_gives_one_message_with_the_form(tmp_path: Path, condition: str) -> None:
    path = write(tmp_path, MINIMAL)
    table = "input.format=table"
    with pytest.raises(ConfigError) as caught:
        load_config(Config, path, [table, f"input.filter={condition}"])
    assert str(caught.value).splitlines() == [
        f"--set input.filter={condition}: expected [[column, operator, value]] with an operator of "
        "!= < <= = == > >= in not in"
    ]
    with pytest.raises(ConfigError, match=r"must be a list: \[\[split, not in, \[train\]\]\]"):
        load_config(Config, path, [table, "input.filter=[[split, not in, train]]"])
    assert load_config(Config, path, [table, "input.filter=[[split, in, [a, b]]]"]).input.filter == [
        ["split", "in", ["a", "b"]]
    ]


def test_class_ids_of_a_mapping_are_integers_or_text(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    loaded = load_config(Config, path, ["input.target_map={boot: 9, 3: '4', bag: Bag}"])
    assert loaded.input.target_map == {"boot": "9", "3": "4", "bag": "Bag"}


@pytest.mark.parametrize(
    ("field", "value", "messages"),
    [
        ("target_map", "[a]", ["must be text or a mapping"]),
        ("target_map", "{a: null, b: [1]}", ["{}.a: must be text", "{}.b: must be text"]),
        ("target_map", "{a: true}", ["{}.a: must be text"]),
        ("target_map", "''", ["must not be empty"]),
        ("target_names", "5", ["must be text or a valid list"]),
        ("target_names", "[a, 1]", ["{}.1: must be text"]),
    ],
)
def test_error_of_a_field_with_several_types_names_no_internals(
    tmp_path: Path, field: str, value: str, messages: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Config, write(tmp_path, MINIMAL), [f"input.{field}={value}"])
    start = f"--set input.{field}={value}: "
    assert str(caught.value).splitlines() == [start + each.format(f"input.{field}") for each in messages]


def test_credentials_in_a_field_with_several_types_are_hidden(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^--set input\.target_map: must not contain credentials"
    ) as caught:
        load_config(Config, write(tmp_path, MINIMAL), ["input.target_map=s3://user:secret@b/x"])
    assert len(str(caught.value).splitlines()) == 1
    assert "secret" not in str(caught.value)


JOB = yaml.safe_load(MINIMAL)
#: A value other than the default, and the formats that use the field.
FIELDS_OF_FORMATS: dict[str, tuple[Any, list[str]]] = {
    "label_field": ("class", ["webdataset"]),
    "key": ("last-dot", ["webdataset"]),
    "image_member": ("left.jpg", ["webdataset"]),
    "image_column": ("img", ["parquet"]),
    "label_column": ("label", ["parquet", "table"]),
    "key_column": ("id", ["parquet", "table"]),
    "uri_column": ("url", ["table"]),
    "filter": ([["split", "=", "train"]], ["table"]),
    "csv_columns": (["url"], ["table"]),
    "check_objects": ("never", ["table"]),
    "carry": (["id"], ["webdataset", "parquet", "table"]),
    "on_damaged_shard": ("keep", ["webdataset", "parquet"]),
}


@pytest.mark.parametrize("format", ["auto", "webdataset", "parquet", "images", "table"])
@pytest.mark.parametrize("field", FIELDS_OF_FORMATS)
def test_field_that_the_format_ignores_is_refused(field: str, format: str, tmp_path: Path) -> None:
    value, formats = FIELDS_OF_FORMATS[field]
    values = {"uri": "/in", "format": format, field: value}
    path = write(tmp_path, json.dumps({**JOB, "input": values}))
    if format in formats or (format == "auto" and formats != ["table"]):
        load_config(Config, path)
        return
    remedy = f"remove the field, or set format: {' or '.join(formats)}"
    with pytest.raises(ConfigError, match=f"input.{field}: not used with format: {format}; {remedy}$"):
        load_config(Config, path)
    values[field] = InputConfig.model_fields[field].default
    load_config(Config, write(tmp_path, json.dumps({**JOB, "input": values})))


def test_recorded_configuration_of_any_format_is_accepted(tmp_path: Path) -> None:
    for format in ("auto", "webdataset", "parquet", "images", "table"):
        config = load_config(Config, write(tmp_path, MINIMAL), [f"input.format={format}"])
        record = {"run": "x", "fingerprint": "y", "config": config.model_dump(mode="json")}
        assert load_config(Config, write(tmp_path, json.dumps(record))) == config


def test_field_of_another_format_is_refused_in_training_and_schedules(tmp_path: Path) -> None:
    train = {"train": {"uri": "/a"}, "validation": {"uri": "/b", "format": "images", "key_column": "id"}}
    train |= {"model": {"pretrained": "x"}, "output": {"uri": "/out"}}
    with pytest.raises(ConfigError, match=r"validation\.key_column: not used with format: images"):
        load_config(TrainConfig, write(tmp_path, json.dumps(train)))
    dataset = {**JOB, "cron": "@daily", "input": {"uri": "/in", "filter": [["a", "=", 1]]}}
    with pytest.raises(ConfigError, match=r"datasets\.a\.input\.filter: not used with format: auto"):
        load_config(ScheduleConfig, write(tmp_path, json.dumps({"datasets": {"a": dataset}})))
