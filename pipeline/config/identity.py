"""What determines a label: the settings of a configuration, and the hash over them and the model."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cvt.runtimes import resolve_precision
from pipeline.config.job import Config


def label_settings(config: Config) -> dict[str, Any]:
    """Returns the settings that determine a label, whatever the model: no place, and no share of the work."""
    settings: dict[str, Any] = {
        "precision": resolve_precision(config.model.precision, config.classify.device),
        "output": config.output.model_dump(exclude={"uri"}),
        "input": config.input.model_dump(exclude={"uri", "format"}),
    }
    decoder = config.decode.resolved_device(config.classify.device), config.decode.quality
    if decoder != ("cpu", "exact"):
        settings["decode"] = decoder
    return settings


def fingerprint(settings: Mapping[str, Any], checkpoint_digest: str) -> str:
    """Returns the SHA-256 over everything that determines a label, in hexadecimal."""
    whole = {**settings, "checkpoint": checkpoint_digest}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
