"""Converts the files of Fashion-MNIST to WebDataset shards of PNG images and their class ids.

    python examples/fashion_mnist_shards.py FOLDER_OF_IDX_FILES data/fashion-mnist

This script made the sample in the package and the training shards of the bundled checkpoint. The output is
the same in each run, byte for byte.
"""

import gzip
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES_PER_SHARD = 5000


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped IDX file of unsigned bytes."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        sys.exit(f"{path}: not an IDX file of unsigned bytes")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def main(source: Path, target: Path) -> None:
    """Converts the 60,000 training and 10,000 test images."""
    for part, name in (("train", "train"), ("test", "t10k")):
        images = read_idx(source / f"{name}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{name}-labels-idx1-ubyte.gz")
        folder = target / part
        folder.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, len(images), IMAGES_PER_SHARD)):
            path = folder / f"{part}-{number:04d}.tar"
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for index in range(start, min(start + IMAGES_PER_SHARD, len(images))):
                    png = io.BytesIO()
                    Image.fromarray(images[index]).save(png, "png", optimize=True)
                    for kind, content in (("png", png.getvalue()), ("cls", b"%d" % labels[index])):
                        member = tarfile.TarInfo(f"{part}-{index:05d}.{kind}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
