"""Converts a checkpoint to another layout: `cvt-label convert`. `cvt.checkpoints` has the layouts."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs import console
from pipeline.text import pluralize

Layout = Literal["hugging-face", "microsoft"]


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Checkpoint, in any form that model.path accepts.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="New folder. With --to microsoft: new .pth file.")
    ],
    labels: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the class names: one per line, or JSON.")
    ] = None,
    to: Annotated[Layout, typer.Option("--to", help="Layout to write.")] = "hugging-face",
    size: Annotated[
        Literal["224", "384"] | None, typer.Option(help="Image size in pixels. Default: the checkpoint's.")
    ] = None,
    activation: Annotated[
        Literal["gelu", "quick_gelu"] | None,
        typer.Option(help="Microsoft's code has quick_gelu. Default: the checkpoint's; gelu if not stored."),
    ] = None,
) -> None:
    """Convert a checkpoint to the Hugging Face or Microsoft layout.

    The Hugging Face layout is a folder that transformers loads; a notice reports exceptions. The Microsoft
    layout is a .pth file. The file has no labels and no preprocessing, so this package loads it only if it is
    a published variant of CvT.
    """
    # Importing PyTorch takes seconds. --help and usage errors do not need PyTorch.
    import torch

    from cvt.architecture import transformers_problem
    from cvt.checkpoints import save_checkpoint
    from cvt.checkpoints.microsoft import image_size, microsoft_key
    from pipeline.classify.checkpoint import open_checkpoint
    from pipeline.storage import Storage, StorageError, temporary_folder

    _check_target(target, to)
    if activation is not None and to == "microsoft":
        raise typer.BadParameter("a Microsoft file does not store the activation", param_hint="--activation")
    checkpoint = open_checkpoint(Storage(), source, labels=labels)
    if activation is not None:
        checkpoint = replace(checkpoint, architecture=replace(checkpoint.architecture, hidden_act=activation))
    config = checkpoint.architecture
    preprocessor = checkpoint.preprocessor
    if size is not None:
        preprocessor = replace(preprocessor, size=int(size))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The target appears complete or not at all.
        with temporary_folder(target.parent) as unfinished:
            written = unfinished / target.name
            if to == "hugging-face":
                save_checkpoint(checkpoint.to_transformers(), preprocessor, written)
            else:
                weights = checkpoint.model.state_dict()
                torch.save({microsoft_key(key): tensor for key, tensor in weights.items()}, written)
            written.rename(target)
    except OSError as error:
        raise StorageError(str(target), error.strerror or str(error)) from error
    classes = pluralize(len(checkpoint.labels), "class")
    console.print_line(f"{target}: {checkpoint.name}, {classes}, {preprocessor.size} pixels")
    if (problem := transformers_problem(config)) and to == "hugging-face":
        console.print_notice(f"cvt-label: {problem}")
    if to == "microsoft":  # a .pth file has no preprocessing and no activation
        pixels, _ = image_size(target.name, config)
        loads = f"cvt-label: {target.name} will load with"
        if pixels != preprocessor.size:
            console.print_notice(f"{loads} an image size of {pixels} pixels, because of its name")
        if config.hidden_act != "gelu":
            console.print_notice(f"{loads} GELU: a Microsoft file does not store the activation")


def _check_target(target: Path, to: Layout) -> None:
    """Checks that the target can be written, before the model is loaded."""
    problem = None
    if re.match(r"\w+:/", str(target)):
        problem = "must be a local path"
    elif target.exists():
        problem = "exists and is not overwritten"
    elif (target.suffix == ".pth") != (to == "microsoft"):
        problem = "the name must end with .pth if --to is microsoft, and must not otherwise"
    elif not next(parent for parent in target.absolute().parents if parent.exists()).is_dir():
        problem = "is under a file, not a folder"
    if problem is not None:
        raise typer.BadParameter(f"{target}: {problem}", param_hint="TARGET")
