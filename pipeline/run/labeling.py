"""One labeling run, from configuration to run record. Each part is handed what it needs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial

from pipeline.commit import (
    WRITERS,
    Committer,
    Lease,
    LeaseLostError,
    ManifestRow,
    ManifestWriter,
    Partition,
    Progress,
    RunRecord,
    Totals,
    new_run_id,
)
from pipeline.compare import RunPair
from pipeline.config import LABEL_NEW, Config, Selection
from pipeline.dataflow import (
    Executor,
    Resources,
    Stop,
    Stopped,
    graceful_stop,
    open_executor,
    sigterm_interrupts,
)
from pipeline.read import Shard, list_shards
from pipeline.report import Gallery
from pipeline.run import gate, summaries
from pipeline.run.cleanup import clean_up, withdraw_regrouped
from pipeline.run.job import Job, make_job
from pipeline.run.planning import Plan
from pipeline.run.preparing import PreparedRun, open_listing, prepare
from pipeline.run.recording import Clock, recorded
from pipeline.statistics import (
    CLASSIFY,
    COMMIT,
    DECODE,
    STORAGE,
    ClassStatistics,
    StageFigures,
    bound_by,
    stage_figures,
)
from pipeline.storage import ObjectNotFound, Storage, StorageError, faults

logger = logging.getLogger("cvt_label")


@dataclass
class RunResult:
    """What a run did.

    Attributes:
        run: its id.
        job: what it ran.
        plan: what it was to do.
        totals: what it committed.
        withdrawn: groups of image files whose labels it removed again, since its input has changed.
        statistics: class statistics over all labels of the partition; None where the run changed nothing.
        timings: seconds from its start to each event, by name.
        stages: each stage's part in it; empty where nothing was to be labeled.
        decoded_on_gpu: of the decoded images, those that a GPU decoded; None where only the CPU was to.
        gallery: thumbnails of what it labeled; None where nothing was to be.
        gpu_utilisation: share of the time in which GPUs were busy; None where nobody measured it.
        broken_limits: of the configured gate, in words.
    """

    run: str
    job: Job
    plan: Plan
    totals: Totals = field(default_factory=Totals)
    withdrawn: set[str] = field(default_factory=set)
    statistics: ClassStatistics | None = None
    timings: dict[str, float] = field(default_factory=dict)
    stages: dict[str, StageFigures] = field(default_factory=dict)
    decoded_on_gpu: int | None = None
    gallery: Gallery | None = None
    gpu_utilisation: float | None = None
    broken_limits: list[str] = field(default_factory=list)

    @property
    def partition(self) -> Partition:
        """Where the labels are."""
        return self.job.partition

    @property
    def pruned(self) -> int:
        """Deleted shards whose labels the run removed."""
        return len(self.plan.to_prune)

    @property
    def rate(self) -> float:
        """Samples a second, from the start of the dataflow to its last result."""
        if "last_result" not in self.timings:
            return 0.0
        return self.totals.images / max(self.timings["last_result"] - self.timings["ray_ready"], 1e-9)

    @property
    def decoder(self) -> str:
        """What decoded the images, in words."""
        if self.decoded_on_gpu is not None:
            on_cpu = self.stages[DECODE].images - self.decoded_on_gpu
            return f"the GPU, {self.decoded_on_gpu:,} images, and the CPU, {on_cpu:,}"
        return f"the CPU, {self.job.config.decode.quality}"

    @property
    def is_complete(self) -> bool:
        """Whether every shard of the input is labeled, as it is now."""
        return not self.totals.unreadable and not self.plan.skipped_failures


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
    clock, before = Clock(), faults()
    listing = open_listing(config)
    job = make_job(config)
    first_id = new_run_id()
    lease = Lease(job.storage, job.partition.uri, first_id, config.run.lease_s, new_id=new_run_id)
    with sigterm_interrupts(), lease.held(wait, on_wait) as handle:
        run = lease.run
        if run != first_id:  # it waited, and the input may have changed meanwhile
            listing = open_listing(config)
        try:
            with recorded(job, run, clock, selection) as record:
                prepared = prepare(job, listing, selection, handle.found_in_order)
                plan = prepared.plan
                clock.mark("planned")
                on_plan(prepared)
                logger.info("run %s labels %d shards to %s", run, len(plan.shards), job.partition.uri)
                counts = {str(state): count for state, count in plan.states.items()}
                record.note(plan=counts | {"to_label": len(plan.shards)})
                result = RunResult(run, job, plan, timings=clock.seconds)
                try:
                    _Run(result, prepared, record, clock, lease, on_progress).carry_out()
                finally:
                    record.note(storage_faults=dict(faults() - before + result.totals.retries))
        except Stopped:
            handle.left_in_order = True
            raise
        handle.left_in_order = True
    return result


@dataclass
class _Run:
    """A run in progress; its attributes are what the steps share."""

    result: RunResult
    prepared: PreparedRun
    record: RunRecord
    clock: Clock
    lease: Lease
    on_progress: Callable[[Progress, PreparedRun], None]
    writer: ManifestWriter = field(init=False)
    removed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        job = self.result.job
        manifest, flush_s = job.partition.manifest, job.config.run.flush_s
        self.writer = ManifestWriter(manifest, flush_s, before_write=self.record.save)

    def carry_out(self) -> None:
        """Does what is planned, and leaves everything in order; raises as `label`."""
        result, prepared = self.result, self.prepared
        plan, job, partition = prepared.plan, result.job, result.job.partition
        stop: Stop | None = None
        try:
            if not prepared.in_order:  # some process may have died
                partition.storage.sweep(partition.uri)
            self.removed, changed = clean_up(
                partition, plan, prepared.repairs, self.record, self.lease, self._relist
            )
            if plan.shards:
                stop = self._label()
            self.writer.flush()
            if result.withdrawn:
                partition.manifest.update({}, result.withdrawn)
            if changed or plan.shards or not prepared.in_order or summaries.has_unwanted(job):
                self._summarize()
                self.clock.mark("published")
            else:
                self._judge_again()
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

    def _relist(self) -> Iterator[Shard]:
        """The input as it is now; for what only overlapping runs make necessary."""
        section = self.result.job.config.input
        return list_shards(self.result.job.storage, section.uri, section.format)

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
        result, job, partition = self.result, self.result.job, self.result.job.partition
        runs = self._run_pair()
        result.statistics, previous = runs.compare()
        summaries.write_class_table(partition, result.statistics, job.config.output.topk)
        self._note_counts()
        self._note_judgment(*gate.judge(gate.limits(job.config), runs, previous))
        gone = {*self.record.values["removed"], *result.withdrawn}
        gallery = summaries.update_gallery(job, result.statistics, result.gallery, gone)
        so_far = {"seconds": self.clock.seconds, "ended_at": datetime.now(UTC).isoformat()}
        values = self.record.values | so_far
        summaries.write_report(partition, values, result.statistics, previous, gallery)

    def _judge_again(self) -> None:
        """Holds what earlier runs labeled to the gate, where this one adds nothing."""
        job = self.result.job
        limits = gate.limits(job.config)
        if limits.are_any:
            self._note_judgment(*gate.judge_again(limits, self._run_pair()))

    def _note_judgment(self, drift: Mapping[str, object] | None, broken: list[str]) -> None:
        self.result.broken_limits = broken
        self.record.note(drift=drift, broken_limits=broken)

    def _run_pair(self) -> RunPair:
        job = self.result.job
        return RunPair.find(job.partition, job.config.input.uri, self.result.run)

    def _label(self) -> Stop:
        """Sends the plan's shards through the dataflow; returns whether it was asked to stop."""
        result, plan, job = self.result, self.result.plan, self.result.job
        config = job.config
        groups: dict[str, ManifestRow] = {}
        gallery = result.gallery = Gallery(config.report.gallery, plan.shards)

        failing = self.prepared.failing

        def on_commit(row: ManifestRow) -> None:
            if row.error is not None:
                self.record.failure(row)
            elif row.uri in failing:
                self.record.shards("cured", [row.uri])
            if row.format == "images" and row.output is not None:
                groups[row.uri] = row
            gallery.settle(row.uri, row.error is None)
            self.writer.add(row)
            self.clock.mark("first_commit")

        committer = Committer(
            job.partition,
            job.fingerprint,
            job.prediction_options,
            plan.shards,
            result.run,
            expected={uri: v for uri, v in plan.expected.items() if uri not in self.removed},
            is_current=partial(_is_current, job.partition.storage, config.input.format),
            on_commit=on_commit,
            before_group=self.lease.verify,
        )
        result.totals = committer.totals
        with (
            self._regrouped_withdrawn(groups),
            open_executor(config.ray) as executor,
            committer,
            graceful_stop(config.run.grace_s) as stop,
        ):
            self._commit_results(executor, committer, gallery, stop)
        return stop

    @contextmanager
    def _regrouped_withdrawn(self, groups: Mapping[str, ManifestRow]) -> Iterator[None]:
        """Finally removes labels of image files that the input has in other groups by then."""
        try:
            yield
        finally:
            result, entries = self.result, self.prepared.repairs.entries
            result.withdrawn = withdraw_regrouped(
                result.job.partition, result.plan, groups, entries, self._relist
            )

    def _commit_results(self, executor: Executor, committer: Committer, gallery: Gallery, stop: Stop) -> None:
        """Takes the results of all shards, or, after a stop, of those that are begun."""
        plan, job, faults_before = self.result.plan, self.result.job, faults()
        resources = executor.resources(job.resource_request)
        self.record.note(resources=asdict(resources))
        self.clock.mark("ray_ready")
        logger.info("images go to the model in batches of %d", resources.batch_size)
        metrics = executor.metrics(
            job.config.input.uri, job.partition.model, len(plan.shards), resources.batch_size
        )

        def note_progress() -> None:
            metrics.update(committer.totals, faults() - faults_before + committer.totals.retries)
            self.on_progress(committer.progress(), self.prepared)

        chunks = executor.label(plan.shards, job.stages, resources)
        started = 0.0
        with closing(chunks), stop.abandonable(), _missing_shards_noted(committer):
            for chunk in chunks:
                self.clock.mark("first_result")
                started = started or time.perf_counter() - chunk.metrics[CLASSIFY].busy_s
                if stop.requested:
                    committer.wind_down()
                committer.add(gallery.take(chunk))
                metrics.chunk(chunk)
                note_progress()
                self.lease.check()
                if stop.requested and not committer.open_shards:
                    break
        seconds = time.perf_counter() - started if started else 0.0
        self.clock.mark("last_result", again=True)
        if stop.requested:
            committer.settle()
        else:
            committer.finish()
        self._note_stages(resources, seconds)
        note_progress()

    def _note_stages(self, resources: Resources, seconds: float) -> None:
        """Notes what each stage did in so many seconds of the dataflow, in the result and in the record."""
        result, metrics = self.result, self.result.totals.metrics
        workers = {STORAGE: min(resources.readers, len(result.plan.shards)), COMMIT: WRITERS}
        if resources.decoders:
            workers[DECODE] = resources.decoders
        else:
            result.decoded_on_gpu = metrics[DECODE].decoded_on_gpu if DECODE in metrics else 0
        result.stages = stage_figures(metrics, workers, seconds)
        result.gpu_utilisation = metrics[CLASSIFY].gpu_utilization if CLASSIFY in metrics else None
        self.record.note(
            stages={stage: asdict(figures) for stage, figures in result.stages.items()},
            bound_by=bound_by(result.stages),
            gpu_utilisation=result.gpu_utilisation,
            decoder=result.decoder,
        )


@contextmanager
def _missing_shards_noted(committer: Committer) -> Iterator[None]:
    """Adds to an error what it may be about; where workers die again and again, Ray can't say."""
    try:
        yield
    except Exception as error:
        error.add_note(f"The first shards that were not done: {', '.join(committer.missing(5))}")
        raise


def _is_current(storage: Storage, input_format: str, shard: Shard) -> bool:
    """Whether the input still has this version of a shard."""
    if shard.members:
        listing = list_shards(storage, shard.uri.rpartition("/")[0], input_format)
        return any((other.uri, other.version) == (shard.uri, shard.version) for other in listing)
    try:
        return storage.stat(shard.uri).version == shard.version
    except ObjectNotFound:
        return False
