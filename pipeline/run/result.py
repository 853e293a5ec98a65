"""What a run did."""

from dataclasses import dataclass, field

from pipeline.commit import Partition, Totals
from pipeline.report import Gallery
from pipeline.run.job import Job
from pipeline.run.planning import Plan
from pipeline.statistics import DECODE, ClassStatistics, StageFigures


@dataclass
class RunResult:
    """What a run did.

    Attributes:
        run: its id.
        totals: what it committed.
        withdrawn: groups of image files whose labels it removed again, since its input has changed.
        statistics: class statistics over all labels of the partition; None where the run changed nothing.
        timings: seconds from its start to each event, by name.
        stages: each stage's part in it; empty where nothing was to be labeled.
        decoded_on_gpu: of the decoded images, those that a GPU decoded; None where only the CPU was to.
        gallery: thumbnails of what it labeled; None where nothing was to be.
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
