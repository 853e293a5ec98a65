"""One labeling run, from configuration to run record. Each step receives its inputs as arguments."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress

from pipeline.commit import Lease, LeaseLostError, ManifestWriter, Progress, new_run_id
from pipeline.config import LABEL_NEW, Config, Selection, Share
from pipeline.dataflow import StopController, sigterm_interrupts
from pipeline.read import IgnoreReason
from pipeline.run.cleanup import clean_up, roll_back_regrouped
from pipeline.run.gate import check_gate_alone, read_earlier_failures
from pipeline.run.job import check_installed, make_job
from pipeline.run.planning import PreparedRun, open_listing, prepare
from pipeline.run.recording import Phase, RunContext, RunResult, run_record
from pipeline.run.streaming import label_shards
from pipeline.run.summaries import has_unwanted_gallery, summarize
from pipeline.storage import StorageError, retry_counts
from pipeline.text import pluralize

logger = logging.getLogger("cvt_label")

#: Number of ignored objects of each reason that a log message names.
_NAMED_OBJECTS = 5


def label(
    config: Config,
    selection: Selection = LABEL_NEW,
    *,
    on_progress: Callable[[Progress, PreparedRun], None] = lambda progress, prepared: None,
    on_plan: Callable[[PreparedRun], None] = lambda prepared: None,
    on_phase: Callable[[Phase], None] = lambda phase: None,
    wait: bool = False,
    on_wait: Callable[[str], None] = lambda message: None,
) -> RunResult:
    """Labels new and changed shards; writes predictions, manifest, statistics and report.

    Args:
        config: configuration of the job.
        selection: which other shards to label, and whether to prune.
        on_progress: called in this thread when results have arrived.
        on_plan: called with the plan before anything is labeled.
        on_phase: called in this thread when a phase before the first result, or after the last one, starts.
        wait: wait while another run holds the lease of the partition, instead of raising.
        on_wait: called with a message when the wait starts.

    Raises:
        StorageError: the input can't be listed, or the output can't be written.
        NoShardsError: the input has no shard.
        CheckpointError: the model can't be loaded.
        ConfigError: an option does not fit the model, the installed packages or the stored labels.
        ConnectionError: no Ray cluster answers.
        LeaseHeldError: another run labels the same partition.
        LeaseLostError: another run has taken over.
        Stopped: SIGTERM or Ctrl-C arrived; the manifest has everything that was committed.
    """
    start, retries_before = time.monotonic(), retry_counts()
    check_installed(config)
    on_phase(Phase.LISTING)
    # An input without shards fails before anything is written, and before images of a table are looked up.
    unchecked = config.input.model_copy(update={"check_objects": "never"})
    open_listing(config.model_copy(update={"input": unchecked}))
    on_phase(Phase.LOADING_MODEL)
    job = make_job(config)
    opened_s = time.monotonic() - start
    share, seconds = Share.parse(config.run.share), config.run.lease_duration_s
    lease = Lease(job.storage, job.partition.uri, new_run_id(), seconds, share=share)
    with sigterm_interrupts(), lease.held(wait, on_wait):
        run = lease.run
        on_phase(Phase.PLANNING)
        # Listed again under the lease: another run may have labeled shards that the first listing lacks.
        listing = open_listing(config)
        with run_record(job, run, start, selection) as record:
            record.timings["checkpoint_opened"] = round(opened_s, 3)
            prepared = prepare(job, listing, selection, lease.found_clean_shutdown)
            job, plan = prepared.job, prepared.plan
            record.record_time("planned")
            on_plan(prepared)
            if plan.shards:
                shards = pluralize(len(plan.shards), "shard")
                logger.info("run %s labels %s to %s", run, shards, job.partition.uri)
            if listing.ignored:
                names = [uri for uris in listing.ignored_examples.values() for uri in uris[:_NAMED_OBJECTS]]
                # Hidden objects and metadata belong to a dataset; another format may be a mistake.
                level = logging.WARNING if IgnoreReason.FORMAT in listing.ignored else logging.INFO
                logger.log(level, "ignored: %s; such as %s", listing.describe_ignored(), ", ".join(names))
            ignored = [(*each, count) for each, count in listing.ignored_extensions.most_common()]
            counts = {str(state): count for state, count in plan.states.items()}
            record.set(plan=counts | {"to_label": len(plan.shards)}, ignored=ignored)
            result = RunResult(run, job, plan, timings=record.timings)
            interval = config.run.flush_interval_s
            writer = ManifestWriter(job.partition.manifest, interval, record.save, share.count)
            context = RunContext(
                result, prepared, record, lease, writer, on_progress, on_phase, retries_before
            )
            _execute(context)
    return result


def _execute(run: RunContext) -> None:
    """Executes the plan, and updates manifest, statistics and report. Raises the same errors as `label`."""
    plan, partition = run.result.plan, run.result.partition
    stop: StopController | None = None
    try:
        if not run.prepared.clean_shutdown:  # a run that died may have left temporary files
            partition.storage.remove_unfinished_writes(partition.uri)
        read_earlier_failures(run)
        changed = clean_up(run)
        if plan.shards:
            try:
                stop = label_shards(run)
            finally:  # images may have moved to other groups in the meantime
                run.result.rolled_back |= roll_back_regrouped(run)
        run.writer.flush()
        if run.result.rolled_back:
            partition.manifest.update({}, run.result.rolled_back)
        if changed or plan.shards or not run.prepared.clean_shutdown or has_unwanted_gallery(run):
            run.on_phase(Phase.SUMMARIZING)
            summarize(run)
            run.record.record_time("summarized")
        else:
            check_gate_alone(run)
    except LeaseLostError:  # the manifest of the other run is newer
        run.record.discard_unsaved()
        raise
    except BaseException:
        with suppress(StorageError):  # it would hide the exception that ended the run
            run.writer.flush()
        raise
    finally:
        run.writer.close()
        run.record_counts()
    run.lease.clean_shutdown = True
    if stop is not None:
        stop.raise_if_requested()
    status = "complete" if run.result.is_complete else "incomplete"
    run.record.set(status="aborted" if run.result.aborted else status, failures=dict(run.failures.judged()))
