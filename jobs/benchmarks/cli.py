"""The command group `cvt-label benchmark`."""

from jobs.app import make_app
from jobs.benchmarks.decoding import decoding
from jobs.benchmarks.end_to_end import run
from jobs.benchmarks.model import model
from jobs.console import add_command

app = make_app()
for command in (run, model, decoding):
    add_command(app, command)
