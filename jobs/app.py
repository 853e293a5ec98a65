"""The empty command line. This module imports only typer, so that `cvt-label --help` is fast."""

import typer


def make_app() -> typer.Typer:
    """Returns an empty command line. Unexpected errors are plain Python tracebacks; help is plain text."""
    return typer.Typer(
        pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True, rich_markup_mode=None
    )
