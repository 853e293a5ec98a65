"""Progress of a command on standard error: a bar on a terminal, otherwise lines in the log."""

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from time import monotonic

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from jobs import console

logger = logging.getLogger("cvt_label")

#: Seconds between two lines in the log.
LOG_INTERVAL = 10.0
#: Seconds of results that the rate and the remaining time need, and those that they are computed from.
MIN_RATE_SECONDS, MAX_RATE_SECONDS = 5.0, 600.0


class ProgressView(Progress):
    """Shows a phase, or a progress with its description, rate and remaining time.

    Args:
        activity: what the command does when it shows a progress, such as "labeling".
        interval: seconds between two lines in the log.
        clock: returns seconds, for tests.
    """

    _text = ""  # rich reads the renderables in its own constructor

    def __init__(
        self, activity: str, interval: float = LOG_INTERVAL, clock: Callable[[], float] = monotonic
    ) -> None:
        columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("elapsed")
        super().__init__(
            *columns,
            TimeElapsedColumn(),
            console=console.stderr,
            transient=True,
            disable=not console.stderr.is_terminal,
            redirect_stdout=sys.stdout.isatty(),
            speed_estimate_period=MAX_RATE_SECONDS,
            get_time=clock,
        )
        self._activity, self._interval = activity, interval
        self._phase, self._since = "starting", clock()
        self._work = self.add_task(self._phase, total=None)
        self._images = self.add_task("images", total=None, visible=False)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._log, name="progress", daemon=True)

    def start(self) -> None:
        """Starts the bar or the log."""
        super().start()
        console.log_to_stderr()
        if self.disable:
            self._thread.start()

    def stop(self) -> None:
        """Removes the bar, or stops the log."""
        super().stop()
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def show_phase(self, phase: str) -> None:
        """Shows the name of a phase."""
        if self.disable:
            for line in filter(None, (self._text, phase)):
                logger.info("%s", line)
        self._phase, self._since, self._text = phase, self.get_time(), ""
        self.update(self._work, description=phase)

    def show_progress(self, text: str, images: int, fraction: float | None = None) -> None:
        """Shows a progress: its description, the number of images, and the completed fraction if known."""
        work, counted = self.tasks
        if not counted.completed:  # until the first result
            self._since = self.get_time()
        total = None if fraction is None else 1.0
        self.update(self._work, description=self._activity, total=total, completed=fraction)
        self.update(self._images, completed=images)
        if self.get_time() - self._since >= MIN_RATE_SECONDS:
            if counted.speed:
                text += f", {counted.speed:,.1f} images/s"
            if work.time_remaining is not None:
                text += f", remaining {timedelta(seconds=work.time_remaining)}"
        self._text = text

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields the bar, and the description below the bar."""
        yield from super().get_renderables()
        if self._text:
            yield Text(self._text)

    def _log(self) -> None:
        while not self._stopped.wait(self._interval):
            seconds = self.get_time() - self._since
            logger.info("%s", self._text or f"{self._phase}, {seconds:.0f} s")
