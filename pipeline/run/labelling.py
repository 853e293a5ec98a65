"""One run of the labelling job, from configuration to run record.

It hands each part what it needs, and holds no logic of theirs: planning, dataflow and commit are elsewhere.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING

import pyarrow as pa

from cvt.runtimes import NO_OPENVINO
from pipeline.commit import (
    WRITERS,
    Committer,
    Lease,
    LeaseLostError,
    ManifestRow,
    ManifestWriter,
    Progress,
    Repairs,
    RunRecord,
    Totals,
    find_repairs,
    left_in_order,
    new_run_id,
    read_known,
    read_record,
    rebuilt_rows,
)
from pipeline.compare import Succession
from pipeline.config import LABEL_NEW, NO_TORCHVISION, Config, ConfigError, Selection
from pipeline.dataflow import Stop, graceful_stop, sigterm_interrupts
from pipeline.dataflow.ray_cluster import ray_cluster
from pipeline.read import Shard, list_shards
from pipeline.report import Gallery
from pipeline.run import summaries
from pipeline.run.cleanup import grouped_otherwise, remove, tidy
from pipeline.run.inputs import check_groups, check_input
from pipeline.run.job import Job, check_room, make_job
from pipeline.run.planning import Work, compare
from pipeline.run.recording import Clock, recorded
from pipeline.statistics import (
    CLASSIFY,
    COMMIT,
    DECODE,
    ON_GPU,
    STORAGE,
    ClassStatistics,
    Comparison,
    Limits,
    StageFigures,
    bound_by,
    class_table,
    gpu_utilisation,
    stage_figures,
)
from pipeline.storage import ObjectNotFound, Storage, StorageError, faults

if TYPE_CHECKING:
    from pipeline.dataflow import Resources


logger = logging.getLogger("cvt_label")


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has left everything in order."""


@dataclass(frozen=True)
class Plan:
    """What a run is to do, found out without doing it.

    Attributes:
        job: where the labels go.
        work: which shards are in which state, and what is to be labelled.
        ignored: objects under the input URI that are no shard.
        repairs: how the manifest differs from what it is made from.
        failing: shards that couldn't be read at last, before this run.
        in_order: whether the last run has left manifest and statistics up to date, and nobody has removed
            the manifest.
    """

    job: Job
    work: Work
    ignored: int
    repairs: Repairs
    failing: frozenset[str]
    in_order: bool

    @property
    def shards(self) -> list[Shard]:
        """What is to be labelled."""
        return self.work.shards

    @cached_property
    def images(self) -> int | None:
        """Images in all, where the listing tells: of loose images only."""
        if not all(shard.members for shard in self.shards):
            return None
        return sum(len(shard.members) for shard in self.shards)


@dataclass
class RunResult:
    """What a run did.

    Attributes:
        run: its id.
        plan: what it was to do.
        totals: what it has committed.
        pruned: shards whose labels it has removed, since the input no longer has them.
        withdrawn: groups of loose images whose labels it has removed again, since its input has changed.
        statistics: the class statistics over everything that the partition holds; None where the run
            has changed nothing.
        timings: seconds from its start to each event, by name.
        worker_faults: failures of storage that passed, in the workers, by kind.
        stages: each stage's part in it; empty where nothing was to be labelled.
        decoded_on_gpu: of the images that were decoded, those by a GPU; None where only the CPU was to.
        gallery: thumbnails of what it has labelled; None where nothing was to be.
        gpu_utilisation: share of the time in which GPUs were busy; None where nobody measured it.
        broken_limits: of the configured gate, in words.
    """

    run: str
    plan: Plan
    totals: Totals = field(default_factory=Totals)
    pruned: int = 0
    withdrawn: set[str] = field(default_factory=set)
    statistics: ClassStatistics | None = None
    timings: dict[str, float] = field(default_factory=dict)
    worker_faults: Counter[str] = field(default_factory=Counter)
    stages: dict[str, StageFigures] = field(default_factory=dict)
    decoded_on_gpu: int | None = None
    gallery: Gallery | None = None
    gpu_utilisation: float | None = None
    broken_limits: list[str] = field(default_factory=list)

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
        return f"the CPU, {self.plan.job.config.decode.quality}"

    @property
    def is_complete(self) -> bool:
        """Whether every shard of the input is labelled, as it is now."""
        return not self.totals.unreadable and not self.plan.work.skipped_failures

    @property
    def class_table(self) -> pa.Table:
        """The class statistics as `class_stats.parquet` holds them."""
        assert self.statistics is not None
        job = self.plan.job
        return class_table(self.statistics, job.checkpoint.labels, job.config.output.topk)


def make_plan(config: Config, selection: Selection = LABEL_NEW) -> Plan:
    """Lists input and manifest, and loads the model; nothing is written, and Ray is not needed.

    Raises:
        StorageError: the input can't be listed, or the output not read.
        NoShardsError: nothing in the input is a shard.
        ConfigError: the output lies in the input, or an option doesn't fit the model.
        CheckpointError: the model can't be loaded.
    """
    check_input(config)
    job = make_job(config)
    _check_decodable(job)
    return _plan(job, selection, left_in_order(job.partition.storage, job.partition.uri))


def _check_installed(config: Config) -> None:
    """Tells at once, not from within a worker, that something isn't installed; nodes are alike."""
    runtime = config.classify.runtime
    if runtime == "openvino" and importlib.util.find_spec(runtime) is None:
        raise ConfigError(f"classify.runtime: {NO_OPENVINO}")
    decodes_on_gpu = config.decode.resolved_device(config.classify.device) == "gpu"
    if decodes_on_gpu and importlib.util.find_spec("torchvision") is None:
        raise ConfigError(
            f"decode.device: the GPU decodes by torchvision, which is missing: {NO_TORCHVISION}"
        )


def _check_decodable(job: Job) -> None:
    """Tells at once whether a GPU can do this model's preprocessing."""
    if job.config.decode.resolved_device(job.config.classify.device) == "gpu":
        # With torch, for which --help needn't wait.
        from cvt.inference.device_preprocessing import DevicePreprocessor

        try:
            DevicePreprocessor(job.checkpoint.preprocessor)
        except ValueError as error:
            raise ConfigError(f"decode.device: {error}") from error


def _plan(job: Job, selection: Selection, in_order: bool) -> Plan:
    config, storage, manifest = job.config, job.partition.storage, job.partition.manifest
    in_order = in_order and manifest.exists()
    known = read_known(manifest)
    repairs = find_repairs(storage, job.partition.uri, job.fingerprint, known, in_order)
    failing = frozenset(uri for uri, row in known.items() if row.error is not None)
    check_groups(known, config.input.uri)
    listing = list_shards(storage, config.input.uri, config.input.format)
    work = compare(listing, known, config.input.uri, selection, config.input.format)
    check_room(job.partition, work.shards)
    return Plan(job, work, listing.ignored, repairs, failing, in_order)


def run_labelling(
    config: Config,
    on_progress: Callable[[Progress, Plan], None] = lambda progress, plan: None,
    selection: Selection = LABEL_NEW,
    *,
    wait: bool = False,
    on_wait: Callable[[str], None] = lambda message: None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> RunResult:
    """Labels what is new or changed in the input; writes predictions, manifest, statistics and report.

    Args:
        config: the job's configuration.
        on_progress: called when results have come in, from the thread that calls this.
        selection: what else is to be labelled.
        wait: until no other run works on the same labels, rather than to raise.
        on_wait: called with what is waited for.
        on_plan: called with what is to be done, before it is.

    Raises:
        StorageError: input can't be listed, or output can't be written.
        NoShardsError, CheckpointError, ConfigError: as `make_plan`.
        ConnectionError: no Ray cluster answers.
        LeaseHeldError: another run works on the same labels.
        LeaseLostError: another run has taken over.
        Stopped: SIGTERM or Ctrl-C came; everything that was committed is in the manifest.
    """
    clock, before = Clock(), faults()
    _check_installed(config)
    check_input(config)
    job = make_job(config)
    _check_decodable(job)
    lease = Lease(
        job.partition.storage, job.partition.uri, new_run_id(), config.run.lease_s, new_id=new_run_id
    )
    with sigterm_interrupts(), lease.held(wait, on_wait) as holding:
        run = lease.run
        try:
            with recorded(job, run, clock, selection) as record:
                plan = _plan(job, selection, holding.found_in_order)
                clock.mark("planned")
                on_plan(plan)
                logger.info("run %s labels %d shards to %s", run, len(plan.shards), job.partition.uri)
                counts = {str(state): count for state, count in plan.work.states.items()}
                record.note(plan=counts | {"to_label": len(plan.shards)})
                result = RunResult(run, plan, timings=clock.seconds)
                try:
                    _Run(result, record, clock, lease, on_progress).carry_out()
                finally:
                    record.note(storage_faults=dict(faults() - before + result.worker_faults))
        except Stopped:
            holding.left_in_order = True
            raise
        holding.left_in_order = True
    return result


@dataclass
class _Run:
    """A run at work.

    Attributes:
        result: what it does.
        record: of it.
        clock: its own.
        lease: that it holds.
        on_progress: called when results have come in.
        writer: of the manifest.
    """

    result: RunResult
    record: RunRecord
    clock: Clock
    lease: Lease
    on_progress: Callable[[Progress, Plan], None]
    writer: ManifestWriter = field(init=False)

    def __post_init__(self) -> None:
        job = self.result.plan.job
        flush_s = job.config.run.flush_s
        self.writer = ManifestWriter(job.partition.manifest, flush_s, before_write=self.record.save)

    def carry_out(self) -> None:
        """Does what is planned, and leaves everything in order; raises as `run_labelling`."""
        result, plan, job = self.result, self.result.plan, self.result.plan.job
        stop = Stop()
        try:
            result.pruned = len(plan.work.to_prune)
            if not plan.in_order:  # some process may have died
                job.partition.storage.sweep(job.partition.uri)
            changed = tidy(job, plan.work, plan.repairs, self.record, self.lease)
            if plan.shards:
                stop = self._label()
            self.writer.flush()
            if result.withdrawn:
                job.partition.manifest.update({}, result.withdrawn)
            if changed or plan.shards or not plan.in_order or summaries.has_unwanted(job):
                self._summarise()
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
        if stop.requested:
            raise KeyboardInterrupt if stop.abandoned else Stopped

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

    def _summarise(self) -> None:
        """Writes what lies beside the predictions."""
        result, job = self.result, self.result.plan.job
        runs = self._succession()
        result.statistics, sides = runs.fold()
        table = summaries.write_class_table(job, result.statistics)
        stored = job.partition
        previous = runs.compared(stored, sides)
        self._note_counts()
        self._judge(runs, previous)
        gone = {*self.record.values["removed"], *result.withdrawn}
        gallery = summaries.update_gallery(job, result.statistics, result.gallery, gone)
        so_far = {"seconds": self.clock.seconds, "ended_at": datetime.now(UTC).isoformat()}
        values = self.record.values | so_far
        summaries.write_report(stored, values, result.statistics, previous, gallery)

    def _succession(self) -> Succession:
        job = self.result.plan.job
        return Succession.of(job.partition, job.config.input.uri, self.result.run)

    def _judge_again(self) -> None:
        """Holds what earlier runs have labelled to the limits of the gate, where this one adds nothing."""
        job = self.result.plan.job
        if not self._limits.are_any:
            return
        runs, previous = self._succession(), None
        if runs.now:
            stored = job.partition
            previous = runs.compared(stored, runs.fold()[1])
        self._judge(runs, previous)

    def _judge(self, runs: Succession, previous: Comparison | None) -> None:
        """Holds a comparison to the limits; where nothing is new, what the last run has found out stands."""
        drift = None if previous is None else previous.totals
        if not runs.now and runs.before:
            job = self.result.plan.job
            record = read_record(job.partition.storage, job.partition.uri, runs.before[-1])
            drift = (record or {}).get("drift")
        self.result.broken_limits = self._limits.broken(drift) if drift else []
        self.record.note(drift=drift, broken_limits=self.result.broken_limits)

    @property
    def _limits(self) -> Limits:
        return Limits(**self.result.plan.job.config.gate.model_dump())

    def _label(self) -> Stop:
        """Sends the plan's shards through the dataflow; returns whether it was asked to stop."""
        result, plan, job = self.result, self.result.plan, self.result.plan.job
        config = job.config
        groups: dict[str, str | None] = {}
        gallery = result.gallery = Gallery(config.report.gallery, plan.shards)

        def on_commit(row: ManifestRow) -> None:
            if row.error is not None:
                self.record.failure(row)
            elif row.uri in plan.failing:
                self.record.shards("cured", [row.uri])
            if row.format == "images" and row.output is not None:
                groups[row.uri] = row.output_version
            gallery.settle(row.uri, row.error is None)
            self.writer.add(row)
            self.clock.mark("first_commit")

        committer = Committer(
            job.target,
            plan.shards,
            result.run,
            expected=plan.work.expected,
            is_current=partial(_is_current, job.partition.storage, config.input.format),
            on_commit=on_commit,
            before_group=self.lease.verify,
        )
        result.totals, result.worker_faults = committer.totals, committer.faults
        with (
            _regrouped_withdrawn(result, groups),
            ray_cluster(config.ray.address),
            committer,
            graceful_stop(config.run.grace_s) as stop,
        ):
            self._commit_results(committer, gallery, stop)
        return stop

    def _commit_results(self, committer: Committer, gallery: Gallery, stop: Stop) -> None:
        """Takes the results of all shards, or, after a stop, of those that are begun."""
        # Ray is imported only now, when its environment is set.
        from pipeline.dataflow.metrics import RunMetrics
        from pipeline.dataflow.ray_executor import cluster_resources, label_chunks

        plan, job = self.result.plan, self.result.plan.job
        config, faults_before = job.config, faults()
        resources = cluster_resources(config, job.checkpoint)
        self.record.note(resources=asdict(resources))
        self.clock.mark("ray_ready")
        logger.info("Ray is ready; images go to the model in batches of %d", resources.batch_size)
        metrics = RunMetrics(config.input.uri, job.partition.model, resources.batch_size, len(plan.shards))

        def note_progress() -> None:
            metrics.update(committer.totals, committer.spent, faults() - faults_before + committer.faults)
            self.on_progress(committer.progress(), plan)

        chunks = label_chunks(
            plan.shards,
            job.partition.storage,
            job.read_options,
            job.checkpoint,
            job.prediction_options,
            config,
            resources,
        )
        started = 0.0
        with closing(chunks), stop.abandoning(), _missing_shards_noted(committer):
            for chunk in chunks:
                self.clock.mark("first_result")
                started = started or time.perf_counter() - chunk.spent.get(f"{CLASSIFY}.busy_s", 0.0)
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
        self._note_stages(committer.spent, resources, seconds)
        note_progress()

    def _note_stages(self, spent: Mapping[str, float], resources: Resources, seconds: float) -> None:
        """Notes what each stage did in so many seconds of the dataflow, in the result and in the record."""
        result = self.result
        workers = {STORAGE: min(resources.readers, len(result.plan.shards)), COMMIT: WRITERS}
        if resources.decoders:
            workers[DECODE] = resources.decoders
        else:
            result.decoded_on_gpu = int(spent.get(ON_GPU, 0))
        result.stages = stage_figures(spent, workers, seconds)
        result.gpu_utilisation = gpu_utilisation(spent)
        self.record.note(
            stages={stage: asdict(figures) for stage, figures in result.stages.items()},
            bound_by=bound_by(result.stages),
            gpu_utilisation=result.gpu_utilisation,
            decoder=result.decoder,
        )


@contextmanager
def _regrouped_withdrawn(result: RunResult, groups: Mapping[str, str | None]) -> Iterator[None]:
    """Removes, in the end, labels of loose images that the input has meanwhile in other groups.

    For another run may have labelled these, knowing nothing of this one.
    """
    try:
        yield
    finally:
        mine = {m.uri: s.uri for s in result.plan.shards if s.uri in groups for m in s.members}
        result.withdrawn = grouped_otherwise(result.plan.job, mine)
        remove(result.plan.job, {uri: groups[uri] for uri in result.withdrawn})


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


def rebuild(config: Config) -> Job:
    """Makes manifest and class statistics anew, from the prediction files and the records of runs.

    Raises:
        StorageError: the output can't be read or written.
        LeaseHeldError: a run is at work.
        LeaseLostError: a run has taken over.
        CheckpointError, ConfigError: as `make_plan`.
    """
    job = make_job(config)
    storage = job.partition.storage
    lease = Lease(storage, job.partition.uri, new_run_id(), config.run.lease_s)
    with sigterm_interrupts(), lease.held() as holding:
        job.partition.manifest.replace(lambda: rebuilt_rows(storage, job.partition.uri, job.fingerprint))
        lease.verify()
        summaries.write_class_table(job, job.partition.manifest.fold_statistics())
        holding.left_in_order = True
    return job
