"""The command group `cvt-label benchmark`."""

from jobs.benchmarks.decoding import decoding
from jobs.benchmarks.end_to_end import run
from jobs.benchmarks.gpu import gpu
from jobs.benchmarks.model import model
from jobs.benchmarks.publish import publish
from jobs.benchmarks.scale import scale
from jobs.benchmarks.small_jobs import start
from jobs.cli import make_app
from jobs.console import add_command

app = make_app()
for command in (run, start, model, decoding, gpu, scale, publish):
    add_command(app, command)
