"""Converts the files of Fashion-MNIST to WebDataset shards: `python -m jobs.fashion_mnist SOURCE TARGET`.

This script made the sample in this package and the training shards of the bundled checkpoint.
"""

import gzip
import io
import tarfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from jobs.console import run_command


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped IDX file of unsigned bytes.

    Raises:
        ValueError: the file has another format.
    """
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def fashion_mnist(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder with the four *-ubyte.gz files.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder for train/ and test/.")],
    per_shard: Annotated[int, typer.Option(metavar="N", min=1, help="Number of images in a shard.")] = 5000,
) -> None:
    """Convert the 60,000 training and 10,000 test images to WebDataset shards.

    A shard has PNG images and their class ids. The output is deterministic, byte for byte.
    """
    for part, name in (("train", "train"), ("test", "t10k")):
        images = read_idx(source / f"{name}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{name}-labels-idx1-ubyte.gz")
        folder = target / part
        folder.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, len(images), per_shard)):
            path = folder / f"{part}-{number:04d}.tar"
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for index in range(start, min(start + per_shard, len(images))):
                    png = io.BytesIO()
                    Image.fromarray(images[index]).save(png, "png", optimize=True)
                    for kind, content in (("png", png.getvalue()), ("cls", b"%d" % labels[index])):
                        member = tarfile.TarInfo(f"{part}-{index:05d}.{kind}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    run_command(fashion_mnist)
