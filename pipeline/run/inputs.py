"""The input of a job: whether there is something to label, and whether it may be labelled to this output."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.commit import Known
from pipeline.config import Config, ConfigError, make_storage
from pipeline.read import list_shards
from pipeline.read.shards import no_shards
from pipeline.storage import lies_in, normalised


def check_input(config: Config) -> None:
    """Makes sure that there is something to label, and that it isn't the output.

    Raises:
        StorageError: the input can't be listed.
        NoShardsError: nothing in the input is a shard.
        ConfigError: the output lies in the input.
    """
    source, target = normalised(config.input.uri), normalised(config.output.uri)
    if lies_in(target, source):
        raise ConfigError(f"output.uri: {target} lies in the input, {source}: labels would be read as shards")
    listing = list_shards(make_storage(config.storage), config.input.uri, config.input.format)
    if next(listing, None) is None:
        raise no_shards(config.input, listing)


def check_groups(known: Mapping[str, Known], input_uri: str) -> None:
    """Refuses an input within a folder whose loose images are labelled already, in groups of their own.

    Raises:
        ConfigError: it is one.
    """
    root = normalised(input_uri)
    for uri, row in known.items():
        folder = uri.rpartition("/")[0]
        if row.format == "images" and row.output is not None and root.startswith(f"{folder}/"):
            raise ConfigError(
                f"input.uri: {input_uri} lies in {folder}, whose loose images have labels in this output: "
                "label all of them, or choose another output.uri, or they would be labelled twice"
            )
