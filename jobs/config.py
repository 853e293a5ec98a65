"""Prints the JSON Schema of configuration files: `cvt-label config`."""

import json
from typing import Annotated, Literal

import typer

from pipeline.config import json_schema


def config(
    schema: Annotated[Literal["label", "train", "schedule"], typer.Option(help="Kind of configuration.")],
) -> None:
    """Print the JSON Schema of a configuration file, for editors.

    The schema has the description, type, limits and default of each field.
    """
    typer.echo(json.dumps(json_schema(schema), indent=2))
