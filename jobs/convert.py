"""Rewrites a checkpoint in another layout: `python -m jobs.convert SOURCE TARGET`, or `cvt-label convert`.

The layouts themselves belong to `cvt.checkpoints`.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cvt.errors import NoClassifierError
from jobs.console import err, exit_status, out, run_alone

if TYPE_CHECKING:
    from cvt.modeling import CvtForImageClassification, CvtModel
    from cvt.preprocessing import Preprocessor


class Layout(StrEnum):
    """Layouts of the target."""

    HUGGING_FACE = "hugging-face"
    MICROSOFT = "microsoft"


class Size(StrEnum):
    """Height and width of the model's images, in pixels."""

    SMALL = "224"
    LARGE = "384"


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint to convert, as model.path in a configuration.")],
    target: Annotated[Path, typer.Argument(help="New folder; or new .pth file, with `--to microsoft`.")],
    labels: Annotated[
        str | None, typer.Option("--labels", help="File of class names: one a line, or .json.")
    ] = None,
    to: Annotated[Layout, typer.Option("--to", help="Layout of the target.")] = Layout.HUGGING_FACE,
    size: Annotated[
        Size | None, typer.Option("--size", help="Pixels of the model's images; else the checkpoint's.")
    ] = None,
) -> None:
    """Write a checkpoint as a folder that transformers loads, or as a .pth file for Microsoft's code.

    A .pth file contains the weights, without labels and preprocessing. Weights without a classifier become
    those of a CvtModel.

    Exit status: 0; 2 when the target exists or the command line can't be used; 4 when the source can't be
    loaded.
    """
    _check_target(target, to)
    with exit_status():
        model, preprocessor, described = _load(source, labels)
    if size is not None:
        preprocessor = replace(preprocessor, size=int(size))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _bad_target(f"{target.parent}: {error.strerror}") from None
    # The target appears complete or not at all.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as unfinished:
        written = Path(unfinished) / target.name
        _write(model, preprocessor, written, to)
        written.rename(target)
    line = f"{target}: {described}, {preprocessor.size} pixels"
    out.print(line, markup=False, highlight=False, soft_wrap=True)
    if to == Layout.MICROSOFT:
        for warning in _what_loading_misses(model, preprocessor, target.name):
            err.print(f"cvt-label: {warning}", markup=False, highlight=False, soft_wrap=True)


def _check_target(target: Path, to: Layout) -> None:
    if re.match(r"\w+:/", str(target)):
        raise _bad_target(f"{target}: must be a local path")
    if to == Layout.HUGGING_FACE and target.suffix in (".pth", ".pt"):
        raise _bad_target(f"{target}: a .pth file needs --to microsoft")
    if target.exists():
        raise _bad_target(f"{target} exists, and is not overwritten")
    if to == Layout.MICROSOFT and target.suffix != ".pth":
        raise _bad_target(f"{target}: the name must end with .pth")


def _bad_target(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="TARGET")


def _load(source: str, labels: str | None) -> tuple[CvtForImageClassification | CvtModel, Preprocessor, str]:
    """The model, its preprocessing, and a description of the model."""
    from pipeline.classify.checkpoint import open_checkpoint, open_features
    from pipeline.storage import Storage

    try:
        checkpoint = open_checkpoint(Storage(), source, labels=labels)
    except NoClassifierError:
        if labels is not None:
            raise
        return (*open_features(Storage(), source), "no classifier")
    described = f"{checkpoint.name}, {len(checkpoint.labels):,} classes"
    return checkpoint.model, checkpoint.preprocessor, described


def _write(
    model: CvtForImageClassification | CvtModel, preprocessor: Preprocessor, target: Path, to: Layout
) -> None:
    import torch

    from cvt.checkpoints import save_checkpoint
    from cvt.checkpoints.microsoft import microsoft_weights

    if to == Layout.HUGGING_FACE:
        save_checkpoint(model, preprocessor, target)
    else:
        torch.save(microsoft_weights(model), target)


def _what_loading_misses(
    model: CvtForImageClassification | CvtModel, preprocessor: Preprocessor, name: str
) -> list[str]:
    """Warnings about what cannot be seen in a .pth file, which has weights and a name only."""
    from cvt.checkpoints.microsoft import image_size, is_published

    warnings = []
    if not is_published(model):
        warnings.append(
            "this is no published variant: to load it again, name it pytorch_model.bin, next to its"
            " config.json and preprocessor_config.json"
        )
    if image_size(name) != preprocessor.size:
        warnings.append(f"by its name, {name} loads as a model of {image_size(name)} pixels")
    return warnings


if __name__ == "__main__":
    run_alone(convert)
