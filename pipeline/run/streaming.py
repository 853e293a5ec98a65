"""The plan's shards on their way through the executor to the committer."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial

from pipeline.commit import (
    WRITERS,
    Committer,
    Lease,
    ManifestRow,
    ManifestWriter,
    PredictionWriter,
    Progress,
    RunRecord,
)
from pipeline.config import InputFormat
from pipeline.dataflow import Executor, Resources, Stop, graceful_stop, open_executor
from pipeline.read import Chunk, Shard, list_shards
from pipeline.report import Gallery
from pipeline.run.preparing import PreparedRun
from pipeline.run.recording import Clock
from pipeline.run.result import RunResult
from pipeline.statistics import CLASSIFY, COMMIT, DECODE, STORAGE, bound_by, stage_figures
from pipeline.storage import Storage, retries

logger = logging.getLogger("cvt_label")


@dataclass
class RunContext:
    """What the steps of a run share."""

    result: RunResult
    prepared: PreparedRun
    record: RunRecord
    clock: Clock
    lease: Lease
    writer: ManifestWriter
    on_progress: Callable[[Progress, PreparedRun], None]


class ShardStream:
    """Labels the plan's shards, and notes in result, record and manifest what became of each.

    Attributes:
        groups: manifest rows of the groups of image files that were labeled, by URI.
    """

    def __init__(self, run: RunContext) -> None:
        self.groups: dict[str, ManifestRow] = {}
        self._run = run
        self._failing = run.prepared.failing
        self._gallery = Gallery(run.result.job.config.report.gallery, run.prepared.plan.shards)
        run.result.gallery = self._gallery

    def run(self, removed: set[str]) -> Stop:
        """Labels all shards, or, after a stop, those that were started.

        The prediction files of `removed` shards are no longer expected.
        """
        job, plan = self._run.result.job, self._run.prepared.plan
        writer = PredictionWriter(
            job.partition,
            job.fingerprint,
            job.prediction_options,
            self._run.result.run,
            expected={uri: version for uri, version in plan.expected.items() if uri not in removed},
            is_current=partial(_is_current, job.storage, job.config.input.format),
            before_group=self._run.lease.verify,
        )
        committer = Committer(writer, plan.shards, self._note_commit)
        self._run.result.totals = committer.totals
        with (
            open_executor(job.config.ray) as executor,
            committer,
            graceful_stop(job.config.run.grace_s) as stop,
        ):
            self._commit_results(executor, committer, stop)
        return stop

    def _note_commit(self, row: ManifestRow) -> None:
        if row.error is not None:
            self._run.record.failure(row)
        elif row.uri in self._failing:
            self._run.record.shards("cured", [row.uri])
        if row.format == "images" and row.output is not None:
            self.groups[row.uri] = row
        self._gallery.settle(row.uri, row.error is None)
        self._run.writer.add(row)
        self._run.clock.mark("first_commit")

    def _commit_results(self, executor: Executor, committer: Committer, stop: Stop) -> None:
        plan, job, faults_before = self._run.prepared.plan, self._run.result.job, retries()
        resources = executor.resources(job.resource_request)
        self._run.record.note(resources=asdict(resources))
        self._run.clock.mark("ray_ready")
        logger.info("images go to the model in batches of %d", resources.batch_size)
        metrics = executor.metrics(
            job.config.input.uri, job.partition.model, len(plan.shards), resources.batch_size
        )

        def note_progress(chunk: Chunk | None = None) -> None:
            if metrics is not None:
                metrics.update(committer.totals, retries() - faults_before + committer.totals.retries, chunk)
            self._run.on_progress(committer.progress(), self._run.prepared)

        chunks = executor.label(plan.shards, job.stages, resources)
        started = 0.0
        with closing(chunks), stop.abandonable(), _missing_shards_noted(committer):
            for chunk in chunks:
                self._run.clock.mark("first_result")
                started = started or time.perf_counter() - chunk.metrics[CLASSIFY].busy_s
                if stop.requested:
                    committer.wind_down()
                committer.add(self._gallery.take(chunk))
                note_progress(chunk)
                self._run.lease.check()
                if stop.requested and not committer.open_shards:
                    break
        seconds = time.perf_counter() - started if started else 0.0
        self._run.clock.mark("last_result", again=True)
        if stop.requested:
            committer.settle()
        else:
            committer.finish()
        self._note_stages(resources, seconds)
        note_progress()

    def _note_stages(self, resources: Resources, seconds: float) -> None:
        """Notes what each stage did in so many seconds of the dataflow."""
        result, metrics = self._run.result, self._run.result.totals.metrics
        workers = {STORAGE: min(resources.readers, len(result.plan.shards)), COMMIT: WRITERS}
        if resources.decoders:
            workers[DECODE] = resources.decoders
        else:
            result.decoded_on_gpu = metrics[DECODE].decoded_on_gpu if DECODE in metrics else 0
        result.stages = stage_figures(metrics, workers, seconds)
        self._run.record.note(
            stages={stage: asdict(figures) for stage, figures in result.stages.items()},
            bound_by=bound_by(result.stages),
            gpu_utilisation=metrics[CLASSIFY].gpu_utilization if CLASSIFY in metrics else None,
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
