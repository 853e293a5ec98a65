"""One labeling run, from configuration to run record. Each part is handed what it needs."""

import logging
from collections.abc import Callable
from contextlib import suppress

from pipeline.commit import Lease, LeaseLostError, ManifestWriter, Progress, new_run_id
from pipeline.config import LABEL_NEW, Config, Selection
from pipeline.dataflow import Stop, Stopped, sigterm_interrupts
from pipeline.run.cleanup import clean_up, withdraw_regrouped
from pipeline.run.job import check_installed, make_job
from pipeline.run.planning import PreparedRun, open_listing, prepare
from pipeline.run.recording import Clock, RunContext, RunResult, recorded
from pipeline.run.streaming import label_shards
from pipeline.run.summaries import has_unwanted_gallery, judge_again, summarize
from pipeline.storage import StorageError, retry_counts

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
    clock, before = Clock(), retry_counts()
    check_installed(config)
    open_listing(config)  # an input without shards fails before anything is written
    job = make_job(config)
    lease = Lease(job.storage, job.partition.uri, new_run_id(), config.run.lease_duration_s)
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
                writer = ManifestWriter(
                    job.partition.manifest, config.run.flush_interval_s, before_write=record.save
                )
                try:
                    _carry_out(RunContext(result, prepared, record, clock, lease, writer, on_progress))
                finally:
                    record.note(storage_retries=dict(retry_counts() - before + result.totals.retries))
        except Stopped:
            lease.left_in_order = True
            raise
        lease.left_in_order = True
    return result


def _carry_out(run: RunContext) -> None:
    """Carries out the plan and updates manifest, statistics and report; raises as `label`."""
    plan, partition = run.result.plan, run.result.partition
    stop: Stop | None = None
    try:
        if not run.prepared.in_order:  # some process may have died
            partition.storage.remove_unfinished_writes(partition.uri)
        removed, changed = clean_up(run)
        if plan.shards:
            try:
                stop = label_shards(run, removed)
            finally:  # images may have moved to other groups meanwhile
                run.result.rolled_back = withdraw_regrouped(run)
        run.writer.flush()
        if run.result.rolled_back:
            partition.manifest.update({}, run.result.rolled_back)
        if changed or plan.shards or not run.prepared.in_order or has_unwanted_gallery(run):
            summarize(run)
            run.clock.mark("summarized")
        else:
            judge_again(run)
    except LeaseLostError:  # the manifest of the other run is newer
        run.record.forget()
        raise
    except BaseException:
        with suppress(StorageError):  # it would hide what ended the run
            run.writer.flush()
        raise
    finally:
        run.writer.close()
        run.note_counts()
    if stop is not None:
        stop.conclude()
