"""Rewrites a checkpoint in another layout: `python -m jobs.convert SOURCE TARGET`, or `cvt-label convert`."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cvt.errors import CheckpointError, NoClassifierError
from jobs.console import err, exit_status, out, run_alone

if TYPE_CHECKING:
    from torch import Tensor

    from cvt.modeling import CvtForImageClassification, CvtModel


class Layout(StrEnum):
    """What is written."""

    HUGGING_FACE = "hugging-face"
    MICROSOFT = "microsoft"


class Size(StrEnum):
    """Height and width of the model's images, in pixels."""

    SMALL = "224"
    LARGE = "384"


def convert(
    source: Annotated[
        str, typer.Argument(help="What is converted: whatever `model.path` can be; URIs, too.")
    ],
    target: Annotated[Path, typer.Argument(help="New folder; or new .pth file, with `--to microsoft`.")],
    labels: Annotated[
        str | None,
        typer.Option("--labels", help="File of the classes' names: one a line, or .json."),
    ] = None,
    to: Annotated[Layout, typer.Option("--to", help="Layout of the target.")] = Layout.HUGGING_FACE,
    size: Annotated[
        Size | None,
        typer.Option("--size", help="Pixels of the model's images, instead of what the checkpoint says."),
    ] = None,
) -> None:
    """Write a checkpoint as a folder that transformers loads, or as a .pth file for Microsoft's code.

    A .pth file holds the weights alone, and neither labels nor preprocessing. Weights without a classifier
    become those of a CvtModel.

    Exit status: 0; 2 when the target exists or the command line can't be used; 4 when the source can't be
    loaded.
    """
    if re.match(r"\w+:/", str(target)):
        raise typer.BadParameter(f"{target}: must be a local path", param_hint="TARGET")
    if to == Layout.HUGGING_FACE and target.suffix in (".pth", ".pt"):
        raise typer.BadParameter(f"{target}: a .pth file needs --to microsoft", param_hint="TARGET")
    if target.exists():
        raise typer.BadParameter(f"{target} exists, and is not overwritten", param_hint="TARGET")
    if to == Layout.MICROSOFT and target.suffix != ".pth":
        raise typer.BadParameter(f"{target}: the name must end with .pth", param_hint="TARGET")
    with exit_status():
        from pipeline.classify.checkpoint import open_checkpoint, open_features
        from pipeline.storage import Storage

        model: CvtForImageClassification | CvtModel
        try:
            checkpoint = open_checkpoint(Storage(), source, labels=labels)
        except NoClassifierError:
            if labels is not None:
                raise
            (model, preprocessor), described = open_features(Storage(), source), "no classifier"
        else:
            model, preprocessor = checkpoint.model, checkpoint.preprocessor
            described = f"{checkpoint.name}, {len(checkpoint.labels):,} classes"
    import torch

    from cvt.checkpoints import save_checkpoint
    from cvt.checkpoints.microsoft import image_size

    if size is not None:
        preprocessor = replace(preprocessor, size=int(size))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{target.parent}: {error.strerror}", param_hint="TARGET") from None
    # What is under the target's name is whole.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as unfinished:
        written = Path(unfinished) / target.name
        if to == Layout.HUGGING_FACE:
            save_checkpoint(model, preprocessor, written)
        else:
            torch.save(_by_microsoft_name(model), written)
        written.rename(target)
    line = f"{target}: {described}, {preprocessor.size} pixels"
    out.print(line, markup=False, highlight=False, soft_wrap=True)
    if to == Layout.MICROSOFT and not _is_published(model):
        warning = (
            "cvt-label: this is no published variant: to be loaded again, the file needs the name "
            "pytorch_model.bin, and config.json and preprocessor_config.json beside it"
        )
        err.print(warning, markup=False, highlight=False, soft_wrap=True)
    told = image_size(target.name)
    if to == Layout.MICROSOFT and told != preprocessor.size:
        warning = f"cvt-label: who loads {target.name} takes it for a model of {told} pixels, by its name"
        err.print(warning, markup=False, highlight=False, soft_wrap=True)


def _by_microsoft_name(model: CvtForImageClassification | CvtModel) -> dict[str, Tensor]:
    from cvt.checkpoints.microsoft import microsoft_key
    from cvt.modeling import CvtModel

    prefix = f"{CvtModel.base_model_prefix}." if isinstance(model, CvtModel) else ""
    return {microsoft_key(f"{prefix}{key}"): tensor for key, tensor in model.state_dict().items()}


def _is_published(model: CvtForImageClassification | CvtModel) -> bool:
    """Whether Microsoft's names and shapes tell the architecture of a model."""
    from cvt.checkpoints.microsoft import infer_config
    from cvt.configuration import CvtConfig

    try:
        _, told = infer_config(_by_microsoft_name(model))
    except CheckpointError:
        return False
    rates = {"drop_rate", "drop_path_rate", "attention_drop_rate", "initializer_range", "layer_norm_eps"}
    fields = CvtConfig.__annotations__.keys() - rates
    return all(_plain(getattr(told, name)) == _plain(getattr(model.config, name)) for name in fields)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


if __name__ == "__main__":
    run_alone(convert)
