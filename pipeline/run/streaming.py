"""Labels the shards of a plan: runs the dataflow, commits its results, and stops when requested."""

import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial

import pyarrow as pa

from pipeline.commit import MAX_CONCURRENT_WRITES, Committer, ManifestRow, PredictionWriter
from pipeline.config import IN_PROCESS, RayConfig
from pipeline.dataflow import (
    LOCAL,
    Executor,
    Resources,
    Stages,
    StopController,
    graceful_stop,
    open_executor,
    ray_address,
    without_cluster,
)
from pipeline.predictions import carried_column
from pipeline.read import Chunk, Shard, whole_file
from pipeline.run.cleanup import remove_labels
from pipeline.run.copied_rows import read_source
from pipeline.run.gate import check_gate_alone
from pipeline.run.planning import list_input
from pipeline.run.recording import Phase, RunContext
from pipeline.statistics import (
    CLASSIFY,
    COMMIT,
    DECODE,
    STORAGE,
    describe_bottleneck,
    steady_rate,
    summarize_stages,
)
from pipeline.storage import ObjectChanged, ObjectNotFound
from pipeline.text import pluralize

logger = logging.getLogger("cvt_label")

#: Size in bytes from which a file may be divided by another run; only unusual settings divide smaller files.
_DIVIDED_BYTES = 64 * 1024**2
#: Maximum size in bytes, and number of images if it is known, of a plan that runs in this process by default:
#: a local Ray takes longer to start than it saves.
_SMALL_BYTES, _SMALL_IMAGES = 64 * 1024**2, 10_000
#: Fields of `input` that have no effect without labels.
_LABEL_SOURCES = ("label_field", "label_column", "label_from", "target_names", "target_map")
#: Number of unfinished shards that an error message names.
_NAMED_SHARDS = 5


def label_shards(run: RunContext) -> StopController:
    """Labels all shards of the plan; after a stop request, only the shards that have results already."""
    job, plan, stages = run.result.job, run.result.plan, run.result.job.stages
    entries, removed = run.prepared.repairs.entries, {*run.record.values["removed"]}
    found = (entries[shard.uri] for shard in plan.shards if shard.uri in entries)
    expected = {row.uri: row.output_version for row in found if row.uri not in removed}
    writer = PredictionWriter(
        job.partition,
        job.fingerprint,
        stages.predictions,
        run.result.run,
        expected=expected,
        is_current=partial(_is_current, run),
        add_copied=partial(_add_copied, run, stages),
        before_write=partial(_prepare_write, run),
    )
    committer = Committer(writer, plan.shards, partial(_record_commit, run))
    run.result.totals, run.failures.causes = committer.totals, committer.totals.causes
    _ = job.checkpoint.model  # before workers start: an error of the model ends the run
    run.record.record_time("model_loaded")
    settings = _executor_settings(run)
    if settings.address != IN_PROCESS:
        is_local = ray_address(settings.address) == LOCAL
        run.on_phase(Phase.STARTING_RAY if is_local else Phase.CONNECTING_TO_RAY)
    with (
        open_executor(settings) as executor,
        committer,
        graceful_stop(job.config.run.grace_period_s) as stop,
    ):
        try:
            _commit_results(run, executor, committer, stop)
        except Exception as error:  # Ray does not report which shard killed its workers
            if unfinished := committer.unfinished()[:_NAMED_SHARDS]:
                error.add_note(f"The first unfinished shards: {', '.join(unfinished)}")
            raise
    run.record.record_time("executor_stopped")
    if committer.totals.images:
        for name in job.config.input.carry:
            if carried_column(name) not in writer.filled:
                logger.warning("input.carry: no row of this run has a value of %r; check the name", name)
        sources = [f"input.{name}" for name in _LABEL_SOURCES if getattr(job.config.input, name) is not None]
        has_labels = "target_id" in writer.filled or committer.totals.unmatched.count
        if sources and job.config.input.labels and not has_labels:
            logger.warning("%s: no image of this run has a label; check the field", ", ".join(sources))
    return stop


def _executor_settings(run: RunContext) -> RayConfig:
    """Returns the configured settings of Ray; those of this process for a small plan without a cluster.

    A run that did not end may have died from an image that crashes its decoder. Ray isolates decoders.
    """
    config, plan = run.result.job.config, run.result.plan
    if config.classify.pools or not (without_cluster(config.ray) and run.lease.found_clean_shutdown):
        return config.ray
    size, images = sum(shard.size for shard in plan.shards), plan.images or 0
    if size > _SMALL_BYTES or images > _SMALL_IMAGES:
        return config.ray
    logger.info("labels in this process: the input is small; to use a local Ray, set ray.address: local")
    return config.ray.model_copy(update={"address": IN_PROCESS})


def _add_copied(run: RunContext, stages: Stages, shard: Shard, samples: pa.Table) -> pa.Table:
    """Returns all samples of a shard: those that were labeled, and the copied rows."""
    copied = run.result.plan.copied.get(shard.uri)
    if copied is None:
        return samples
    stored = (
        run.held[source] if source in run.held else read_source(source, stages.storage, stages.predictions)
        for source in copied.rows
    )
    try:
        return copied.merge(samples, shard, stored, stages.read_options)
    except (ObjectChanged, ObjectNotFound):  # another run may have taken over the lease
        run.lease.verify()
        raise


def _prepare_write(run: RunContext, shard: Shard) -> None:
    """Removes the labels of the parts of a file whose labels are about to be written.

    Raises `LeaseLostError` for a group of image files, a range of a table or a part of a file if the lease is
    lost: another run may have grouped the images, or divided the file, differently.
    """
    parts = run.result.plan.parts.get(shard.uri, ())
    if shard.images or shard.span or parts or shard.size >= _DIVIDED_BYTES:
        run.lease.verify()
    remove_labels(run.result.partition, parts)


def _record_commit(run: RunContext, row: ManifestRow) -> None:
    """Records the outcome of a shard."""
    before = run.prepared.repairs.entries.get(row.uri)
    if row.error is not None or row.damage is not None:
        run.record.add_failure(row)
    if row.error is None and before is not None and before.error is not None:
        run.record.add_shards("recovered", [row.uri])
    if row.output is not None:
        run.outputs[row.output] = row.output_version
        parts = [part.uri for part in run.result.plan.parts.get(row.uri, ())]
        run.record.add_shards("removed", parts)
        run.result.rolled_back.update(parts)
        if row.format == "images" or whole_file(row.uri) != row.uri:
            run.groups[row.uri] = row
    run.failures.finish(row)
    run.record.set(failures=dict(run.failures.own()))
    run.gallery.finish_shard(row.uri, row.error is None)
    run.writer.add(row)
    run.record.record_time("first_commit")


def _commit_results(run: RunContext, executor: Executor, committer: Committer, stop: StopController) -> None:
    plan, job = run.result.plan, run.result.job
    resources = executor.resources(job.resource_request)
    run.record.set(resources=asdict(resources))
    run.record.record_time("executor_ready")
    run.on_phase(Phase.STARTING_STAGES)
    logger.info("the model runs with %s, %d images at once", resources.runtime, resources.batch_size)
    metrics = executor.metrics(
        str(job.config.input.inputs), job.partition.model, len(plan.shards), resources.batch_size
    )

    def report_progress(chunk: Chunk | None = None) -> None:
        if metrics is not None:
            metrics.update(committer.totals, run.retries(), chunk)
        run.on_progress(committer.progress(), run.prepared)

    chunks = _label_in_order(run, executor, committer, resources, stop)
    first: tuple[int, float] | None = None  # images, and seconds of their classification
    with closing(chunks), stop.until_aborted():
        for chunk in chunks:
            run.record.record_time("first_result")
            committer.accepts_new_shards = not stop.requested
            copied = plan.copied.get(plan.shards[chunk.shard].uri)
            committer.add(run.gallery.collect(chunk, None if copied is None else copied.missing))
            first = first or (committer.progress().images, chunk.metrics[CLASSIFY].busy_s)
            report_progress(chunk)
            run.lease.check()
            if stop.requested and not committer.open_shards:
                break
            if job.config.gate.abort and (broken := run.failures.certain_violations()):
                _abort(run, broken)
                break
            if committer.is_complete:
                break  # does not wait for read tasks for which no shard is left
    run.record.record_time("last_result")
    if stop.requested or run.result.aborted:
        committer.wait_for_writes()
    else:
        committer.finish()
    if first is not None:
        seconds = run.result.timings["last_result"] - run.result.timings["first_result"]
        images_per_s = steady_rate(committer.progress().images - first[0], seconds)
        _record_stages(run, resources, images_per_s, seconds + first[1])
    report_progress()


def _label_in_order(
    run: RunContext, executor: Executor, committer: Committer, resources: Resources, stop: StopController
) -> Generator[Chunk, None, None]:
    """Yields the labeled chunks of the plan: first those of the canary, then, if it passes, of the rest."""
    job, shards, order = run.result.job, run.result.plan.shards, run.failures.order
    canary = [i for i in order if run.failures.is_new(shards[i])][: job.config.gate.canary]
    chosen = set(canary)
    for batch in (canary, [i for i in order if i not in chosen]):
        if not batch or stop.requested:
            continue
        if batch is not canary and canary:
            committer.wait_for_writes()
            run.writer.flush()
            if not check_gate_alone(run):
                _abort(run, run.result.broken_failure_limits + run.result.broken_limits)
                return
        to_read = [run.result.plan.without_copied(shards[i]) for i in batch]
        with closing(executor.label(to_read, job.stages, resources)) as chunks:
            for chunk in chunks:
                yield replace(chunk, shard=batch[chunk.shard])


def _abort(run: RunContext, broken: Sequence[str]) -> None:
    run.result.aborted = True
    remaining = len(run.result.plan.shards) - run.result.totals.shards
    shards = pluralize(remaining, "shard")
    logger.error("the gate stops the run, %s remain: %s", shards, "; ".join(broken))


def _record_stages(run: RunContext, resources: Resources, images_per_s: float | None, seconds: float) -> None:
    """Records the metrics of each stage; `seconds` is the duration of the dataflow."""
    result, metrics = run.result, run.result.totals.metrics
    workers = {STORAGE: min(resources.readers, len(result.plan.shards)), COMMIT: MAX_CONCURRENT_WRITES}
    if resources.decoders:
        workers[DECODE] = resources.decoders
        decoder = f"the CPU, {result.job.config.decode.quality}"
    else:
        decoded = metrics[DECODE]
        on_gpu, on_cpu = decoded.decoded_on_gpu, decoded.images - decoded.decoded_on_gpu
        decoder = f"the GPU, {pluralize(on_gpu, 'image')}, and the CPU, {on_cpu:,}"
    stages = summarize_stages(metrics, workers, seconds)
    result.throughput = {
        "stages": stages,
        "images_per_s": images_per_s,
        "bound_by": describe_bottleneck(stages),
        "gpu_utilization": metrics[CLASSIFY].gpu_utilization,
        "decoder": decoder,
    }
    run.record.set(**result.throughput)


def _is_current(run: RunContext, shard: Shard) -> bool:
    """Returns whether the input still has this version of a shard; raises `LeaseLostError`."""
    job = run.result.job
    if shard.members or shard.rows:
        return any((each.uri, each.version) == (shard.uri, shard.version) for each in list_input(job.config))
    if shard.span:  # a run that divides the file differently may have taken over
        run.lease.verify()
    return job.storage.version(shard.object.uri) == shard.object.version
