"""One labeling run, from configuration to run record. Each part is handed what it needs."""

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime

from pipeline.commit import Lease, LeaseLostError, ManifestWriter, Progress, new_run_id
from pipeline.compare import RunPair
from pipeline.config import LABEL_NEW, Config, Selection
from pipeline.dataflow import Stop, Stopped, sigterm_interrupts
from pipeline.read import Shard, list_shards
from pipeline.report import write_report
from pipeline.run import summaries
from pipeline.run.cleanup import clean_up, withdraw_regrouped
from pipeline.run.job import check_installed, make_job
from pipeline.run.preparing import PreparedRun, open_listing, prepare
from pipeline.run.recording import Clock, recorded
from pipeline.run.result import RunResult
from pipeline.run.streaming import RunContext, ShardStream
from pipeline.statistics import Comparison, Limits
from pipeline.storage import StorageError, retries

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
                manifest, flush_s = job.partition.manifest, config.run.flush_s
                writer = ManifestWriter(manifest, flush_s, before_write=record.save)
                try:
                    _Run(result, prepared, record, clock, lease, writer, on_progress).carry_out()
                finally:
                    record.note(storage_faults=dict(retries() - before + result.totals.retries))
        except Stopped:
            lease.left_in_order = True
            raise
        lease.left_in_order = True
    return result


class _Run(RunContext):
    """A run in progress."""

    def carry_out(self) -> None:
        """Does what is planned, and leaves everything in order; raises as `label`."""
        result, prepared = self.result, self.prepared
        plan, job, partition = prepared.plan, result.job, result.job.partition
        stop: Stop | None = None
        try:
            if not prepared.in_order:  # some process may have died
                partition.storage.sweep(partition.uri)
            removed, changed = clean_up(
                partition, plan, prepared.repairs, self.record, self.lease, self._relist
            )
            if plan.shards:
                stop = self._label(removed)
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
        self._judge(runs, previous)
        gone = {*self.record.values["removed"], *result.withdrawn}
        summaries.update_gallery(job, result.statistics, result.gallery, gone)
        so_far = {"seconds": self.clock.seconds, "ended_at": datetime.now(UTC).isoformat()}
        values = self.record.values | so_far
        try:
            write_report(partition, values, result.statistics, [previous] if previous else [])
        except StorageError:
            raise
        except Exception:  # must not fail a run whose labels are written
            logger.exception("the report could not be drawn")

    def _judge_again(self) -> None:
        """Holds what earlier runs labeled to the gate, where this one adds nothing."""
        if self._limits().are_any:
            runs = self._run_pair()
            self._judge(runs, runs.compare()[1] if runs.current else None)

    def _limits(self) -> Limits:
        return Limits(**self.result.job.config.gate.model_dump())

    def _judge(self, runs: RunPair, previous: Comparison | None) -> None:
        """Holds the comparison with the previous run, if there is one, to the limits of the gate.

        Where nothing is new, the judgment of the last run that labeled something still holds.
        """
        drift = None if previous is None else previous.totals
        if not runs.current and runs.previous is not None:
            drift = (runs.partition.record(runs.previous) or {}).get("drift")
        broken = self._limits().broken(drift) if drift else []
        self.result.broken_limits = broken
        self.record.note(drift=drift, broken_limits=broken)

    def _run_pair(self) -> RunPair:
        job = self.result.job
        return RunPair.find(job.partition, job.config.input.uri, self.result.run)

    def _label(self, removed: set[str]) -> Stop:
        """Labels the plan's shards; then removes labels of images that moved to other groups meanwhile."""
        result = self.result
        stream = ShardStream(self)
        try:
            return stream.run(removed)
        finally:
            entries = self.prepared.repairs.entries
            result.withdrawn = withdraw_regrouped(
                result.partition, result.plan, stream.groups, entries, self._relist
            )
