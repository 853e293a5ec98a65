"""One labeling run, from configuration to run record. Each part is handed what it needs."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial

import numpy as np

from pipeline.classify import GALLERY_CLASSES
from pipeline.commit import (
    WRITERS,
    Committer,
    Lease,
    LeaseLostError,
    ManifestRow,
    ManifestWriter,
    PredictionWriter,
    Progress,
    new_run_id,
)
from pipeline.compare import RunPair
from pipeline.config import LABEL_NEW, Config, InputFormat, Selection
from pipeline.dataflow import (
    Executor,
    Resources,
    Stop,
    Stopped,
    graceful_stop,
    open_executor,
    sigterm_interrupts,
)
from pipeline.read import Chunk, Shard, list_shards
from pipeline.report import GALLERY_FILE, read_gallery, write_gallery, write_report
from pipeline.run.cleanup import clean_up, withdraw_regrouped
from pipeline.run.job import check_installed, make_job
from pipeline.run.planning import PreparedRun, open_listing, prepare
from pipeline.run.recording import Clock, RunContext, RunResult, recorded
from pipeline.run.stored import write_class_table
from pipeline.statistics import (
    CLASSIFY,
    COMMIT,
    DECODE,
    STORAGE,
    ClassStatistics,
    Comparison,
    Limits,
    StageMetrics,
    bound_by,
    stage_figures,
)
from pipeline.storage import ABSENT, Storage, StorageError, retries

logger = logging.getLogger("cvt_label")


def label(
    config: Config,
    selection: Selection = LABEL_NEW,
    *,
    on_progress: Callable[[Progress, PreparedRun], None] = lambda progress, prepared: None,
    on_plan: Callable[[PreparedRun], None] = lambda prepared: None,
    wait: bool = False,
    on_wait: Callable[[str], None] = lambda message: None,
) -> RunResult:
    """Labels what is new or changed in the input; writes predictions, manifest, statistics and report.

    Args:
        config: the job's configuration.
        selection: what else is labeled.
        on_progress: called in this thread when results have arrived.
        on_plan: called with what the run is about to do.
        wait: wait while another run works on the same labels, instead of raising.
        on_wait: called with what is waited for.

    Raises:
        StorageError: the input can't be listed, or the output can't be written.
        NoShardsError, CheckpointError, ConfigError: as `plan_run`.
        ConnectionError: no Ray cluster answers.
        LeaseHeldError: another run works on the same labels.
        LeaseLostError: another run has taken over.
        Stopped: SIGTERM or Ctrl-C came; everything that was committed is in the manifest.
    """
    clock, before = Clock(), retries()
    check_installed(config)
    open_listing(config)  # an input without shards fails before anything is written
    job = make_job(config)
    lease = Lease(job.storage, job.partition.uri, new_run_id(), config.run.lease_s)
    with sigterm_interrupts(), lease.held(wait, on_wait):
        run = lease.run
        # Not before the lease: another run may have labeled what such a listing lacks.
        listing = open_listing(config)
        try:
            with recorded(job, run, clock, selection) as record:
                prepared = prepare(job, listing, selection, lease.found_in_order)
                plan = prepared.plan
                clock.mark("planned")
                on_plan(prepared)
                logger.info("run %s labels %d shards to %s", run, len(plan.shards), job.partition.uri)
                counts = {str(state): count for state, count in plan.states.items()}
                record.note(plan=counts | {"to_label": len(plan.shards)})
                result = RunResult(run, job, plan, timings=clock.seconds)
                writer = ManifestWriter(job.partition.manifest, config.run.flush_s, before_write=record.save)
                try:
                    _Run(result, prepared, record, clock, lease, writer, on_progress).carry_out()
                finally:
                    record.note(storage_faults=dict(retries() - before + result.totals.retries))
        except Stopped:
            lease.left_in_order = True
            raise
        lease.left_in_order = True
    return result


class _ShardStream(RunContext):
    """Labels the plan's shards, and notes in result, record and manifest what became of each."""

    def label_shards(self, removed: set[str]) -> Stop:
        """Labels all shards, or, after a stop, those that were started.

        The prediction files of `removed` shards are no longer expected.
        """
        job, plan = self.result.job, self.result.plan
        writer = PredictionWriter(
            job.partition,
            job.fingerprint,
            job.stages.predictions,
            self.result.run,
            expected={uri: version for uri, version in plan.expected.items() if uri not in removed},
            is_current=partial(_is_current, job.storage, job.config.input.format),
            before_group=self.lease.verify,
        )
        committer = Committer(writer, plan.shards, self._note_commit)
        self.result.totals = committer.totals
        with (
            open_executor(job.config.ray) as executor,
            committer,
            graceful_stop(job.config.run.grace_s) as stop,
        ):
            self._commit_results(executor, committer, stop)
        return stop

    def _note_commit(self, row: ManifestRow) -> None:
        before = self.prepared.repairs.entries.get(row.uri)
        if row.error is not None:
            self.record.failure(row)
        elif before is not None and before.error is not None:
            self.record.shards("cured", [row.uri])
        if row.format == "images" and row.output is not None:
            self.groups[row.uri] = row
        self.gallery.settle(row.uri, row.error is None)
        self.writer.add(row)
        self.clock.mark("first_commit")

    def _commit_results(self, executor: Executor, committer: Committer, stop: Stop) -> None:
        plan, job, retries_before = self.result.plan, self.result.job, retries()
        resources = executor.resources(job.resource_request)
        self.record.note(resources=asdict(resources))
        self.clock.mark("ray_ready")
        logger.info("images go to the model in batches of %d", resources.batch_size)
        metrics = executor.metrics(
            job.config.input.uri, job.partition.model, len(plan.shards), resources.batch_size
        )

        def note_progress(chunk: Chunk | None = None) -> None:
            if metrics is not None:
                metrics.update(committer.totals, retries() - retries_before + committer.totals.retries, chunk)
            self.on_progress(committer.progress(), self.prepared)

        chunks = executor.label(plan.shards, job.stages, resources)
        started = 0.0
        with closing(chunks), stop.abandonable(), _missing_shards_noted(committer):
            for chunk in chunks:
                self.clock.mark("first_result")
                started = started or time.perf_counter() - chunk.metrics[CLASSIFY].busy_s
                if stop.requested:
                    committer.wind_down()
                committer.add(self.gallery.take(chunk))
                note_progress(chunk)
                self.lease.check()
                if stop.requested and not committer.open_shards:
                    break
        seconds = time.perf_counter() - started if started else 0.0
        self.clock.mark("last_result")
        if stop.requested:
            committer.settle()
        else:
            committer.finish()
        self._note_stages(resources, seconds)
        note_progress()

    def _note_stages(self, resources: Resources, seconds: float) -> None:
        """Notes what each stage did in so many seconds of the dataflow."""
        result, metrics = self.result, self.result.totals.metrics
        workers = {STORAGE: min(resources.readers, len(result.plan.shards)), COMMIT: WRITERS}
        if resources.decoders:
            workers[DECODE] = resources.decoders
            result.decoder = f"the CPU, {result.job.config.decode.quality}"
        else:
            decoded = metrics.get(DECODE, StageMetrics())
            on_gpu, on_cpu = decoded.decoded_on_gpu, decoded.images - decoded.decoded_on_gpu
            result.decoder = f"the GPU, {on_gpu:,} images, and the CPU, {on_cpu:,}"
        result.stages = stage_figures(metrics, workers, seconds)
        self.record.note(
            stages={stage: asdict(figures) for stage, figures in result.stages.items()},
            bound_by=bound_by(result.stages),
            gpu_utilisation=metrics[CLASSIFY].gpu_utilization if CLASSIFY in metrics else None,
            decoder=result.decoder,
        )


class _Run(_ShardStream):
    """A run in progress."""

    def carry_out(self) -> None:
        """Does what is planned, and leaves everything in order; raises as `label`."""
        plan, partition = self.result.plan, self.result.partition
        stop: Stop | None = None
        try:
            if not self.prepared.in_order:  # some process may have died
                partition.storage.sweep(partition.uri)
            removed, changed = clean_up(self)
            if plan.shards:
                try:
                    stop = self.label_shards(removed)
                finally:  # images may have moved to other groups meanwhile
                    self.result.withdrawn = withdraw_regrouped(self)
            self.writer.flush()
            if self.result.withdrawn:
                partition.manifest.update({}, self.result.withdrawn)
            if changed or plan.shards or not self.prepared.in_order or self._has_unwanted_gallery():
                self._summarize()
                self.clock.mark("published")
            elif self._limits.are_any:  # holds what earlier runs labeled to the gate
                runs = self._run_pair()
                self._judge(runs, runs.compare()[1] if runs.current else None)
        except LeaseLostError:  # what the other run knows is newer
            self.record.forget()
            raise
        except BaseException:
            with suppress(StorageError):  # it would hide what ended the run
                self.writer.flush()
            raise
        finally:
            self.writer.close()
            self._note_counts()
        if stop is not None:
            stop.conclude()

    def _note_counts(self) -> None:
        totals = self.result.totals
        counts = {
            "shards": totals.shards,
            "unreadable_shards": len(totals.unreadable),
            "images": totals.images,
            "errors": totals.errors,
            "duplicate_keys": totals.duplicate_keys,
            "pruned_shards": self.result.pruned,
        }
        self.record.note(counts=counts, causes=totals.causes.to_record())

    def _summarize(self) -> None:
        """Writes class statistics, gallery and report, and judges the run by its gate."""
        runs, partition = self._run_pair(), self.result.partition
        statistics, previous = runs.compare()
        self.result.statistics = statistics
        write_class_table(partition, statistics, self.result.job.config.output.topk)
        self._note_counts()
        self._judge(runs, previous)
        self._update_gallery(statistics)
        so_far = {"seconds": self.clock.seconds, "ended_at": datetime.now(UTC).isoformat()}
        values = self.record.values | so_far
        try:
            write_report(partition, values, statistics, [previous] if previous else [])
        except StorageError:
            raise
        except Exception:  # must not fail a run whose labels are written
            logger.exception("the report could not be drawn")

    def _has_unwanted_gallery(self) -> bool:
        """Whether there is a gallery, and the configuration has since been set to none."""
        uri = f"{self.result.partition.uri}/{GALLERY_FILE}"
        return not self.result.job.config.report.gallery and self.result.job.storage.version(uri) != ABSENT

    def _update_gallery(self, statistics: ClassStatistics) -> None:
        """Writes `gallery.parquet` without shards that are gone; it keeps the most frequent classes."""
        storage, uri = self.result.job.storage, self.result.partition.uri
        if not self.result.job.config.report.gallery:
            storage.delete(f"{uri}/{GALLERY_FILE}")
            return
        gone = {*self.record.values["removed"], *self.result.withdrawn}
        frequent = np.argsort(-statistics.count, kind="stable")[:GALLERY_CLASSES].tolist()
        write_gallery(storage, uri, self.gallery.merged(read_gallery(storage, uri), gone, set(frequent)))

    @property
    def _limits(self) -> Limits:
        return Limits(**self.result.job.config.gate.model_dump())

    def _judge(self, runs: RunPair, previous: Comparison | None) -> None:
        """Holds the comparison with the previous run, if there is one, to the limits of the gate.

        Where nothing is new, the judgment of the last run that labeled something still holds.
        """
        drift = None if previous is None else previous.totals
        if not runs.current and runs.previous is not None:
            drift = (runs.partition.record(runs.previous) or {}).get("drift")
        broken = self._limits.broken(drift) if drift else []
        self.result.broken_limits = broken
        self.record.note(drift=drift, broken_limits=broken)

    def _run_pair(self) -> RunPair:
        return RunPair.find(self.result.partition, self.result.job.config.input.uri, self.result.run)


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
