"""Checks of a job's input against its output, before anything is labeled."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.commit import ManifestRow
from pipeline.config import Config, ConfigError
from pipeline.storage import lies_in


def check_places(config: Config) -> None:
    """Refuses an output inside the input.

    Raises:
        ConfigError: labels would be read as shards.
    """
    source, target = config.input.uri, config.output.uri
    if lies_in(target, source):
        raise ConfigError(f"output.uri: {target} lies in the input, {source}: labels would be read as shards")


def check_groups(manifest: Mapping[str, ManifestRow], input_uri: str) -> None:
    """Refuses an input inside a folder whose image files are labeled already, in groups of their own.

    Raises:
        ConfigError: the same images would be labeled twice.
    """
    for uri, row in manifest.items():
        folder = uri.rpartition("/")[0]
        if row.format == "images" and row.output is not None and input_uri.startswith(f"{folder}/"):
            raise ConfigError(
                f"input.uri: {input_uri} lies in {folder}, whose loose images have labels in this output: "
                "label all of them, or choose another output.uri, or they would be labelled twice"
            )
