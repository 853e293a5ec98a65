"""Rewrites a checkpoint in another layout: `python -m jobs.convert SOURCE TARGET`, or `cvt-label convert`.

The layouts themselves belong to `cvt.checkpoints`.
"""

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs import console

Layout = Literal["hugging-face", "microsoft"]


@console.exit_on_error()
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

    A .pth file contains the weights, without labels and preprocessing: only a published variant loads again.

    Exit status: 0; 2 when the target exists or the command line can't be used; 4 when the source can't be
    loaded.
    """
    # PyTorch takes seconds, which --help need not wait for.
    import torch

    from cvt.checkpoints import save_checkpoint
    from cvt.checkpoints.microsoft import image_size, microsoft_weights
    from pipeline.classify.checkpoint import open_checkpoint
    from pipeline.storage import Storage

    _check_target(target, to)
    checkpoint = open_checkpoint(Storage(), source, labels=labels)
    preprocessor = checkpoint.preprocessor
    if size is not None:
        preprocessor = replace(preprocessor, size=int(size))
    target.parent.mkdir(parents=True, exist_ok=True)
    # The target appears complete or not at all.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as unfinished:
        written = Path(unfinished) / target.name
        if to == "hugging-face":
            save_checkpoint(checkpoint.model, preprocessor, written)
        else:
            torch.save(microsoft_weights(checkpoint.model), written)
        written.rename(target)
    classes = f"{len(checkpoint.labels):,} classes"
    console.print_line(f"{target}: {checkpoint.name}, {classes}, {preprocessor.size} pixels")
    # A .pth file has weights and a name only, from which the rest is guessed when it is loaded.
    if to == "microsoft" and image_size(target.name) != preprocessor.size:
        pixels = image_size(target.name)
        console.print_notice(f"cvt-label: by its name, {target.name} loads as a model of {pixels} pixels")


def _check_target(target: Path, to: Layout) -> None:
    """Refuses a target that can't be written, before a model is loaded."""
    problem = None
    if re.match(r"\w+:/", str(target)):
        problem = "must be a local path"
    elif target.exists():
        problem = "exists, and is not overwritten"
    elif (target.suffix == ".pth") != (to == "microsoft"):
        problem = "the name must end with .pth with --to microsoft, and only then"
    elif not next(parent for parent in target.absolute().parents if parent.exists()).is_dir():
        problem = "is below a file"
    if problem is not None:
        raise typer.BadParameter(f"{target}: {problem}", param_hint="TARGET")


if __name__ == "__main__":
    console.run_command(convert)
