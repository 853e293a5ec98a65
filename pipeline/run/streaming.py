"""Labels the shards of a plan: starts the dataflow, commits its results, and stops when asked to."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial

from pipeline.commit import WRITERS, Committer, ManifestRow, PredictionWriter
from pipeline.config import InputFormat
from pipeline.dataflow import Executor, Resources, Stop, graceful_stop, open_executor
from pipeline.read import Chunk, Shard, list_shards
from pipeline.run.recording import RunContext
from pipeline.statistics import (
    CLASSIFY,
    COMMIT,
    DECODE,
    STORAGE,
    StageMetrics,
    describe_bottleneck,
    summarize_stages,
)
from pipeline.storage import Storage, retry_counts

logger = logging.getLogger("cvt_label")


def label_shards(run: RunContext, removed: set[str]) -> Stop:
    """Labels all shards of the plan, or, after a stop, those that were started.

    Result, record and manifest of the run receive the outcome of each shard.

    Args:
        run: the run.
        removed: shards whose prediction files were removed, and so are not expected.
    """
    job, plan = run.result.job, run.result.plan
    writer = PredictionWriter(
        job.partition,
        job.fingerprint,
        job.stages.predictions,
        run.result.run,
        expected={uri: version for uri, version in plan.expected.items() if uri not in removed},
        is_current=partial(_is_current, job.storage, job.config.input.format),
        before_group=run.lease.verify,
    )
    committer = Committer(writer, plan.shards, partial(_note_commit, run))
    run.result.totals = committer.totals
    with (
        open_executor(job.config.ray) as executor,
        committer,
        graceful_stop(job.config.run.grace_period_s) as stop,
    ):
        _commit_results(run, executor, committer, stop)
    return stop


def _note_commit(run: RunContext, row: ManifestRow) -> None:
    before = run.prepared.repairs.entries.get(row.uri)
    if row.error is not None:
        run.record.failure(row)
    elif before is not None and before.error is not None:
        run.record.shards("recovered", [row.uri])
    if row.format == "images" and row.output is not None:
        run.groups[row.uri] = row
    run.gallery.finish_shard(row.uri, row.error is None)
    run.writer.add(row)
    run.clock.mark("first_commit")


def _commit_results(run: RunContext, executor: Executor, committer: Committer, stop: Stop) -> None:
    plan, job, retries_before = run.result.plan, run.result.job, retry_counts()
    resources = executor.resources(job.resource_request)
    run.record.note(resources=asdict(resources))
    run.clock.mark("executor_ready")
    logger.info("images go to the model in batches of %d", resources.batch_size)
    metrics = executor.metrics(
        job.config.input.uri, job.partition.model, len(plan.shards), resources.batch_size
    )

    def note_progress(chunk: Chunk | None = None) -> None:
        if metrics is not None:
            metrics.update(
                committer.totals, retry_counts() - retries_before + committer.totals.retries, chunk
            )
        run.on_progress(committer.progress(), run.prepared)

    chunks = executor.label(plan.shards, job.stages, resources)
    started = 0.0
    with closing(chunks), stop.abandonable(), _missing_shards_noted(committer):
        for chunk in chunks:
            run.clock.mark("first_result")
            started = started or time.perf_counter() - chunk.metrics[CLASSIFY].busy_s
            if stop.requested:
                committer.wind_down()
            committer.add(run.gallery.collect(chunk))
            note_progress(chunk)
            run.lease.check()
            if stop.requested and not committer.open_shards:
                break
    seconds = time.perf_counter() - started if started else 0.0
    run.clock.mark("last_result")
    if stop.requested:
        committer.settle()
    else:
        committer.finish()
    _note_stages(run, resources, seconds)
    note_progress()


def _note_stages(run: RunContext, resources: Resources, seconds: float) -> None:
    """Notes what each stage did in so many seconds of the dataflow."""
    result, metrics = run.result, run.result.totals.metrics
    workers = {STORAGE: min(resources.readers, len(result.plan.shards)), COMMIT: WRITERS}
    if resources.decoders:
        workers[DECODE] = resources.decoders
        result.decoder = f"the CPU, {result.job.config.decode.quality}"
    else:
        decoded = metrics.get(DECODE, StageMetrics())
        on_gpu, on_cpu = decoded.decoded_on_gpu, decoded.images - decoded.decoded_on_gpu
        result.decoder = f"the GPU, {on_gpu:,} images, and the CPU, {on_cpu:,}"
    result.stages = summarize_stages(metrics, workers, seconds)
    run.record.note(
        stages={stage: asdict(figures) for stage, figures in result.stages.items()},
        bound_by=describe_bottleneck(result.stages),
        gpu_utilization=metrics[CLASSIFY].gpu_utilization if CLASSIFY in metrics else None,
        decoder=result.decoder,
    )


@contextmanager
def _missing_shards_noted(committer: Committer) -> Iterator[None]:
    """Names the first unfinished shards in an error, since Ray doesn't say which shard killed its workers."""
    try:
        yield
    except Exception as error:
        error.add_note(f"The first shards that were not done: {', '.join(committer.missing(5))}")
        raise


def _is_current(storage: Storage, input_format: InputFormat, shard: Shard) -> bool:
    """Whether the input still has this version of a shard."""
    if shard.members:
        listing = list_shards(storage, shard.uri.rpartition("/")[0], input_format)
        return any((other.uri, other.version) == (shard.uri, shard.version) for other in listing)
    return storage.version(shard.uri) == shard.version
