"""Rewrites a checkpoint in another layout: `python -m jobs.convert SOURCE TARGET`, or `cvt-label convert`.

The layouts themselves belong to `cvt.checkpoints`.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cvt.errors import NoClassifierError
from jobs import console

if TYPE_CHECKING:
    from cvt.modeling import CvtForImageClassification, CvtModel
    from cvt.preprocessing import Preprocessor

Layout = Literal["hugging-face", "microsoft"]


@console.exit_status()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint to convert, as model.path in a configuration.")],
    target: Annotated[Path, typer.Argument(help="New folder; or new .pth file, with `--to microsoft`.")],
    labels: Annotated[
        str | None, typer.Option("--labels", help="File of class names: one a line, or .json.")
    ] = None,
    to: Annotated[Layout, typer.Option("--to", help="Layout of the target.")] = "hugging-face",
    size: Annotated[
        Literal["224", "384"] | None,
        typer.Option("--size", help="Pixels of the model's images; else the checkpoint's."),
    ] = None,
) -> None:
    """Write a checkpoint as a folder that transformers loads, or as a .pth file for Microsoft's code.

    A .pth file contains the weights, without labels and preprocessing. Weights without a classifier become
    those of a CvtModel.

    Exit status: 0; 2 when the target exists or the command line can't be used; 4 when the source can't be
    loaded.
    """
    _check_target(target, to)
    model, preprocessor, described = _load(source, labels)
    if size is not None:
        preprocessor = replace(preprocessor, size=int(size))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{target.parent}: {error.strerror}", param_hint="TARGET") from None
    # The target appears complete or not at all.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as unfinished:
        written = Path(unfinished) / target.name
        _write(model, preprocessor, written, to)
        written.rename(target)
    console.show(f"{target}: {described}, {preprocessor.size} pixels")
    if to == "microsoft":
        _warn_of_loading(model, preprocessor, target.name)


def _check_target(target: Path, to: Layout) -> None:
    problem = None
    if re.match(r"\w+:/", str(target)):
        problem = "must be a local path"
    elif target.exists():
        problem = "exists, and is not overwritten"
    elif (target.suffix == ".pth") != (to == "microsoft"):
        problem = "the name must end with .pth with --to microsoft, and only then"
    if problem is not None:
        raise typer.BadParameter(f"{target}: {problem}", param_hint="TARGET")


def _load(source: str, labels: str | None) -> tuple[CvtForImageClassification | CvtModel, Preprocessor, str]:
    """Returns the model, its preprocessing, and a description of the model."""
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

    if to == "hugging-face":
        save_checkpoint(model, preprocessor, target)
    else:
        torch.save(microsoft_weights(model), target)


def _warn_of_loading(
    model: CvtForImageClassification | CvtModel, preprocessor: Preprocessor, name: str
) -> None:
    """Warns of what a .pth file, which has weights and a name only, does not tell when it is loaded."""
    from cvt.checkpoints.microsoft import image_size, is_published

    if not is_published(model):
        console.note(
            "cvt-label: this is no published variant: to load it again, name it pytorch_model.bin, next to "
            "its config.json and preprocessor_config.json"
        )
    if image_size(name) != preprocessor.size:
        console.note(f"cvt-label: by its name, {name} loads as a model of {image_size(name)} pixels")


if __name__ == "__main__":
    console.run_alone(convert)
