from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.data import DataContext

from pipeline.attempts import Attempt, Attempts
from pipeline.config import (
    ClassifyConfig,
    Config,
    ConfigError,
    DecodeConfig,
    RayConfig,
    ReadConfig,
    load_config,
)
from pipeline.dataflow import ClusterCapacity, ResourceRequest, Resources, choose_resources
from pipeline.dataflow.ray_executor import (
    MAX_READ_TASKS,
    ShardSource,
    _set_context,
    classify_or_die,
    read_shards,
    read_shards_in_turn,
)
from pipeline.dataflow.resources import choose_pools, matches
from pipeline.decode import DecodeOptions
from pipeline.read import NO_SAMPLES, Chunk, Shard
from tests.makers import make_image
from tests.measuring import measure
from tests.pipeline.decode.test_isolated import DEADLY


def config(*overrides: str) -> Config:
    base = ["input.uri=s3://b/in", "model.path=fashion-mnist", "output.uri=s3://b/out"]
    return load_config(Config, None, [*base, *overrides])


CVT_13 = 4_566_000_000  # multiply-accumulate operations for an image of 224 pixels


def choose_on(cluster: ClusterCapacity, config: Config, macs: int = CVT_13, size: int = 224) -> Resources:
    request = ResourceRequest(config.read, config.decode, config.classify, size, macs)
    return choose_resources(request, cluster)


def choose(config: Config, cpus: float, gpus: float, node_cpus: float) -> Resources:
    return choose_on(ClusterCapacity(cpus, gpus, node_cpus), config)


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 16, 64, 256])
def test_one_task_of_each_stage_fits_on_a_single_machine(cpus: int) -> None:
    resources = choose(config(), cpus=cpus, gpus=0, node_cpus=cpus)
    others = resources.readers * config().read.num_cpus + resources.decode_cpus
    assert resources.max_actors >= 1
    assert others + resources.max_actors * resources.classify_cpus <= cpus
    assert resources.device == "cpu"


@pytest.mark.parametrize(
    ("gpus", "precision", "labeled_by", "runtime"),
    [
        (0, "fp32", None, "openvino"),
        (0, "bf16", None, "openvino"),
        (0, "fp16", None, "torch"),  # which OpenVINO lacks
        (0, "fp32", "torch", "torch"),
        (0, "fp32", "compile", "torch"),  # compiled PyTorch is for GPUs
        (1, "fp32", None, "torch"),
        (1, "fp32", "openvino", "torch"),  # a GPU is faster than the CPUs that labeled before
        (1, "fp32", "compile", "compile"),
    ],
)
def test_auto_runtime_depends_on_device_precision_and_stored_labels(
    gpus: int, precision: str, labeled_by: str | None, runtime: str
) -> None:
    pytest.importorskip("openvino")
    request = ResourceRequest(
        ReadConfig(), DecodeConfig(), ClassifyConfig(), 224, CVT_13, precision, labeled_by
    )
    assert choose_resources(request, ClusterCapacity(4, gpus, 4)).runtime == runtime


def test_configured_runtime_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    classify = ClassifyConfig(runtime="torch")
    request = ResourceRequest(ReadConfig(), DecodeConfig(), classify, 224, CVT_13, "fp32", "openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert choose_resources(request, ClusterCapacity(4, 0, 4)).runtime == "torch"


def test_configured_runtime_for_gpus_is_rejected_without_a_gpu() -> None:
    request = ResourceRequest(
        ReadConfig(), DecodeConfig(), ClassifyConfig(runtime="compile"), 224, CVT_13, "fp32"
    )
    assert choose_resources(request, ClusterCapacity(4, 1, 4)).runtime == "compile"
    with pytest.raises(ConfigError, match="'compile' needs a GPU, and there is none"):
        choose_resources(request, ClusterCapacity(4, 0, 4))


def test_single_classifier_uses_all_threads_of_a_small_machine() -> None:
    assert choose(config(), cpus=2, gpus=0, node_cpus=2).threads == 2


def test_several_classifiers_share_the_cores() -> None:
    resources = choose(config(), cpus=64, gpus=0, node_cpus=64)
    assert resources.max_actors > 1
    assert resources.threads is not None
    assert resources.threads * resources.max_actors <= 64


def test_gpus_are_used_if_available() -> None:
    resources = choose(config(), cpus=32, gpus=4, node_cpus=16)
    assert (resources.device, resources.classify_gpus, resources.max_actors) == ("cuda", 1.0, 4)
    assert choose(config("classify.device=cpu"), 32, 4, 16).device == "cpu"


def test_actors_on_gpus_leave_cpus_to_the_other_stages() -> None:
    resources = choose(config(), cpus=4, gpus=8, node_cpus=4)
    used = resources.readers * config().read.num_cpus + resources.decode_cpus
    assert used + resources.max_actors * resources.classify_cpus <= 4


@pytest.mark.parametrize(
    ("overrides", "gpus", "expected"),
    [
        ([], 4, (4, 4)),
        (["classify.max_actors=3"], 4, (3, 3)),
        (["classify.max_actors=8"], 4, (4, 8)),
        (["classify.max_actors=8", "classify.min_actors=6"], 4, (6, 8)),
        (["classify.device=cuda", "classify.max_actors=8"], 0, (1, 8)),
    ],
)
def test_all_gpus_of_a_fixed_cluster_are_used_from_the_start(
    overrides: list[str], gpus: int, expected: tuple[int, int]
) -> None:
    resources = choose(config(*overrides), 32, gpus, 16)
    assert (resources.initial_actors, resources.max_actors) == expected


def choose_on_nodes(config: Config, nodes: list[tuple[dict[str, str], int, int]]) -> Resources:
    """Chooses resources on nodes that are given by their labels, CPUs and GPUs."""
    request = ResourceRequest(config.read, config.decode, config.classify, 224, CVT_13)
    found = [{"Labels": labels, "Resources": {"CPU": cpus, "GPU": gpus}} for labels, cpus, gpus in nodes]
    return choose_pools(request, found)


L4, CPUS = {"ray.io/accelerator-type": "L4"}, {"ray.io/accelerator-type": ""}


def test_pools_share_a_cluster_of_gpus_and_cpus() -> None:
    nodes = [(L4, 8, 1), (L4, 8, 1), ({"ray.io/accelerator-type": "A100"}, 16, 1), (CPUS, 32, 0)]
    pools = "classify.pools=[{gpu: A100, batch_size: 256}, {gpu: L4}, {device: cpu}]"
    fastest = choose_on_nodes(config(pools, "classify.device=cuda"), nodes)
    small, cpu = fastest.helpers
    assert [(pool.device, pool.initial_actors, pool.batch_size) for pool in (fastest, small, cpu)] == [
        ("cuda", 1, 256),
        ("cuda", 2, 64),
        ("cpu", 3, 64),
    ]
    assert cpu.threads == math.ceil(cpu.classify_cpus) == 8
    assert cpu.readers == 1
    used = sum(
        pool.initial_actors * pool.classify_cpus + pool.readers * config().read.num_cpus + pool.decode_cpus
        for pool in (fastest, small, cpu)
    )
    assert used <= 64 - 16  # the other CPUs decode


def test_pool_without_its_kind_of_nodes_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"1 classifiers do not fit .* 0 free GPUs"):
        choose_on_nodes(config("classify.pools=[{gpu: H100}]"), [(L4, 8, 1)])


A100 = {"ray.io/accelerator-type": "A100"}


@pytest.mark.parametrize(
    ("pools", "gpus"),
    [
        ("[{}, {gpu: L4}]", None),
        ("[{gpu: L4, max_actors: 3}, {}]", [2, 2]),
        ("[{max_actors: 1}, {gpu: L4}]", [1, 1]),  # Ray may place the first one on a node with L4
        ("[{gpu: L4, max_actors: 8}, {gpu: L4}]", None),  # the first pool may grow
        ("[{gpu: L4, max_actors: 8}, {gpu: L4, max_actors: 8}]", [2, 1]),  # the second one waits for nodes
        ("[{num_gpus: 0.5, max_actors: 4}, {num_gpus: 0.5}]", [4, 4]),
        ("[{gpu: A100}, {gpu: L4}, {}]", None),
    ],
)
def test_pools_on_the_same_nodes_do_not_count_a_gpu_twice(pools: str, gpus: list[int] | None) -> None:
    nodes = [(L4, 8, 1), (L4, 8, 1), (A100, 32, 2)]
    given = config(f"classify.pools={pools}", "classify.device=cuda")
    if gpus is None:
        with pytest.raises(
            ConfigError, match=r"classify\.pools\.[12]: .* use all . GPUs .*; select other nodes"
        ):
            choose_on_nodes(given, nodes)
    else:
        first = choose_on_nodes(given, nodes)
        assert [pool.initial_actors for pool in (first, *first.helpers)] == gpus


def test_pool_without_free_gpus_leaves_cpus_to_the_decoders_of_the_gpus() -> None:
    nodes = [(L4, 32, 1), (L4, 32, 1)]
    given, chosen = (
        choose_on_nodes(config(f"classify.pools=[{{gpu: L4}}, {pool}]"), nodes).helpers
        for pool in ("{device: cpu}", "{}")
    )
    assert given == chosen


def test_pool_on_cpus_fits_on_its_own_nodes() -> None:
    nodes = [({"zone": "a"}, 8, 1), ({"zone": "b"}, 64, 0)]
    given = config("classify.pools=[{device: cuda}, {device: cpu, num_cpus: 1, label_selector: {zone: a}}]")
    [on_cpus] = choose_on_nodes(given, nodes).helpers
    assert on_cpus.initial_actors <= 8
    assert on_cpus.label_selector == {"zone": "a"}


@pytest.mark.parametrize(
    ("condition", "values"),
    [
        ("a", ["a"]),
        ("!a", ["b", "c", None]),
        ("in(a, b)", ["a", "b"]),
        ("!in(a,b)", ["c", None]),
    ],
)
def test_label_selectors_match_as_in_ray(condition: str, values: list[str | None]) -> None:
    all_labels: list[dict[str, str]] = [{"x": "a"}, {"x": "b"}, {"x": "c"}, {}]
    assert [labels.get("x") for labels in all_labels if matches(labels, {"x": condition})] == values


def test_fractional_gpus_allow_more_actors() -> None:
    assert choose(config("classify.num_gpus=0.5"), 32, 4, 16).max_actors == 8


def test_actors_that_do_not_fit_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"3 classifiers do not fit .* 32 free CPUs and 2 free GPUs"):
        choose(config("classify.min_actors=3"), 32, 2, 16)
    with pytest.raises(ValueError, match="0 free GPUs"):
        choose(config("classify.device=cuda"), 32, 0, 16)


def test_growing_cluster_may_start_without_gpus() -> None:
    resources = choose(config("classify.device=cuda", "classify.max_actors=8"), 4, 0, 4)
    assert (resources.device, resources.max_actors) == ("cuda", 8)


@pytest.mark.parametrize(
    ("macs", "size", "on_cpu", "on_gpu"),
    [
        (18_626_000, 28, 4096, 4096),
        (CVT_13, 224, 128, 1024),
        (14_000_000_000, 384, 32, 256),
        (194_200_000_000, 384, 16, 16),
    ],
)
def test_chunk_size_follows_the_cost_of_the_model(macs: int, size: int, on_cpu: int, on_gpu: int) -> None:
    with_gpu = ClusterCapacity(8, 1, 8)
    assert choose_on(ClusterCapacity(8, 0, 8), config(), macs, size).chunk_images == on_cpu
    assert choose_on(with_gpu, config(), macs, size).chunk_images == on_gpu
    assert choose_on(with_gpu, config("read.chunk_images=7"), macs, size).chunk_images == 7


def test_small_models_get_larger_batches() -> None:
    cluster = ClusterCapacity(8, 0, 8)
    sizes = [choose_on(cluster, config(), macs).batch_size for macs in (1, 2 * 10**9, CVT_13)]
    assert sizes == [256, 128, 64]
    assert choose_on(cluster, config(), 10**12, 384).batch_size == 64
    assert choose_on(cluster, config("classify.batch_size=7")).batch_size == 7


def test_number_of_decoders_follows_the_free_cpus() -> None:
    resources = choose(config(), 16, 1, 16)
    used = resources.readers * config().read.num_cpus + resources.max_actors * resources.classify_cpus
    assert used + resources.decoders * resources.decode_cpus <= 16
    assert resources.decoders == 14


def test_gpu_decoding_uses_no_decode_tasks() -> None:
    resources = choose(config("classify.device=cuda", "decode.device=auto"), 16, 1, 16)
    assert (resources.decoders, resources.decode_cpus) == (0, 0.0)


def test_memory_of_tasks_fits_on_a_small_machine() -> None:
    cluster = ClusterCapacity(2, 0, 2, node_memory=1 << 30)
    resources = choose_on(cluster, config())
    assert resources.read_memory + resources.decode_memory <= 1 << 29
    resources = choose_on(cluster, config("read.memory=1000", "decode.memory=2000"))
    assert (resources.read_memory, resources.decode_memory) == (1000, 2000)


def plan(count: int) -> list[Shard]:
    return [Shard(f"s3://b/{i}.tar", "v", "webdataset", 1) for i in range(count)]


@pytest.mark.parametrize("count", [1, 7, MAX_READ_TASKS, MAX_READ_TASKS + 1, 3 * MAX_READ_TASKS])
def test_each_shard_is_read_by_one_task_and_tasks_are_limited(count: int) -> None:
    read: Any = read_shards
    source = ShardSource(plan(count), read)
    tasks = source.get_read_tasks(parallelism=4)
    assert len(tasks) == source.tasks <= MAX_READ_TASKS
    read = [number for task in tasks for number, _ in task.read_fn.args[0]]
    assert read == list(range(count))


class LocalAttempts:
    """An actor of `Attempts` without Ray."""

    def __init__(self) -> None:
        self._attempts = Attempts(max_attempts=4)

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._attempts, name))


def read_numbered(shards: Sequence[tuple[int, Shard]], failing: set[int]) -> Iterator[Chunk]:
    """Reads shards with 2, 3, 4 chunks; failing shards are an error at once."""
    for number, _ in shards:
        if number in failing:
            yield Chunk(number, 0, NO_SAMPLES, error="deleted")
        else:
            yield from (Chunk(number, start, NO_SAMPLES) for start in range(number + 2))


@pytest.mark.parametrize("failing", [{0}, {1}, {2}, {0, 1, 2}])
@pytest.mark.parametrize("delivered", range(10))
@pytest.mark.parametrize("shards_per_task", [1, 3])
def test_failed_retry_of_a_read_loses_no_chunk_and_no_error(
    failing: set[int], delivered: int, shards_per_task: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    attempts, unavailable = LocalAttempts(), set[int]()
    step = partial(read_numbered, failing=unavailable)
    read_plan: Any = read_shards if shards_per_task == 1 else read_shards_in_turn
    source = ShardSource(plan(3), partial(read_plan, step=step, attempts=attempts), shards_per_task)
    read = partial(source._read, list(enumerate(plan(3))))
    arrived: list[pa.Table] = []
    for death, unavailable_now in enumerate((set[int](), failing, set[int]())):
        unavailable.clear()
        unavailable.update(unavailable_now)
        attempt = read()
        arrived += islice(attempt, len(arrived), delivered + 2 * death)
        attempt.close()
    unavailable.update(failing)
    arrived += islice(read(), len(arrived), None)
    chunks = [chunk for block in arrived for chunk in Chunk.from_block(block)]
    for number in range(3):
        starts = {chunk.start for chunk in chunks if chunk.shard == number}
        failed = any(chunk.error for chunk in chunks if chunk.shard == number)
        assert failed or starts == set(range(number + 2))


class FakeClassifier:
    """A classifier without a model, which may hang."""

    def __init__(self, timeout_s: float, hangs: bool = False) -> None:
        self.decode_options = DecodeOptions(DEADLY, 10**6)
        self.timeout_s = timeout_s
        self._hangs = hangs

    def __call__(self, chunk: Chunk) -> Chunk:
        if self._hangs:
            time.sleep(600)
        return chunk


def test_retry_of_a_classifier_decodes_images_in_a_child_process() -> None:
    images = [make_image(1), make_image(1, (11, 20))]  # a width of 11 ends the decoder
    columns = {"key": ["a", "b"], "error": pa.nulls(2, pa.string()), "image": images}
    chunk = Chunk(3, 0, pa.table(columns))
    classifier: Any = FakeClassifier(timeout_s=60)
    result = classify_or_die(chunk, Attempt(2, 0, None), classifier)
    cause = "cannot decode: the decoder was killed by signal 11 (SIGSEGV)"
    assert result.samples["error"].to_pylist() == [None, cause]
    assert result.pixels is not None
    assert len(result.pixels) == 1
    first = classify_or_die(chunk, Attempt(1, 0, None), classifier)
    assert first.pixels is None


def test_no_progress_limit_covers_all_attempts_at_a_chunk() -> None:
    stages: Any = SimpleNamespace(decode=DecodeConfig(timeout_s=5), classify=ClassifyConfig(timeout_s=50))
    with DataContext.current(DataContext.get_current().copy()):
        for no_progress, limit in ((60, 200), (300, 300)):
            _set_context(RayConfig(task_retries=1, no_progress_timeout_s=no_progress), stages)
            assert DataContext.get_current().execution_no_progress_timeout_s == limit


def test_worker_with_a_hung_model_ends() -> None:
    classifier = FakeClassifier(timeout_s=0.05, hangs=True)
    measured = measure(classify_or_die, Chunk(3, 0, NO_SAMPLES), Attempt(1, 0, None), classifier)
    assert measured.exit_code == 1
    assert measured.outcome is None
