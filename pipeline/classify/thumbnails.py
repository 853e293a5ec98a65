"""Thumbnails for the gallery: the highest- and the lowest-confidence images of each class.

Only classifiers have both pixels and scores. An image gets a thumbnail if it is among the best k of its class
so far: about k * ln(n / k) of n images in each selection.
"""

import heapq
import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline.read import Chunk

#: Maximum number of classes in the gallery; the most frequent classes are kept.
GALLERY_CLASSES = 1000

#: Values of the gallery's column `selection`.
HIGHEST_CONFIDENCE, LOWEST_CONFIDENCE = SELECTIONS = ("highest_confidence", "lowest_confidence")

#: Name of the column in chunks.
THUMBNAIL_COLUMN = "thumbnail"
_JPEG_QUALITY = 80


class Thumbnails:
    """Makes thumbnails of images that may get into the gallery. Thread-safe.

    Args:
        count: number of images per class and selection.
        side: longest side of a thumbnail in pixels.
        max_classes: maximum number of classes.
    """

    def __init__(self, count: int, side: int, max_classes: int = GALLERY_CLASSES) -> None:
        self._count, self._side, self._max_classes = count, side, max_classes
        self._lock = threading.Lock()  # a classifier processes several chunks at the same time
        self._best_scores: dict[str, dict[int, list[float]]] = {selection: {} for selection in SELECTIONS}

    def add_column(self, decoded: Chunk, classified: Chunk) -> Chunk:
        """Adds a column of thumbnails, null for most samples; `decoded` is the same chunk with pixels."""
        samples, pixels = classified.samples, decoded.pixels
        assert pixels is not None
        labeled = np.flatnonzero(pc.is_valid(samples["label_id"]).to_numpy())
        labels = samples["label_id"].drop_null().to_numpy()
        scores = samples["score"].drop_null().to_numpy()
        with self._lock:
            wanted = {index for selection in SELECTIONS for index in self._select(selection, labels, scores)}
        # Index into the pixels by row: rows that could not be decoded have no pixels.
        pixel_index = np.cumsum(pc.is_null(decoded.samples["error"]).to_numpy()) - 1
        pictures: list[bytes | None] = [None] * samples.num_rows
        for row in labeled[sorted(wanted)].tolist():
            pictures[row] = _thumbnail(pixels[int(pixel_index[row])], self._side)
        column = pa.array(pictures, pa.binary())
        return replace(classified, samples=samples.append_column(THUMBNAIL_COLUMN, column))

    def _select(self, selection: str, labels: np.ndarray, scores: np.ndarray) -> Iterator[int]:
        """Yields the indices of the images that are among the best of their class so far."""
        best_scores = self._best_scores[selection]
        ranks = scores if selection == HIGHEST_CONFIDENCE else -scores
        pairs = zip(labels.tolist(), ranks.tolist(), strict=True)
        for index, (label, score) in enumerate(pairs):
            if label not in best_scores and len(best_scores) >= self._max_classes:
                continue
            best = best_scores.setdefault(label, [])
            if len(best) < self._count:
                heapq.heappush(best, score)
            elif score > best[0]:
                heapq.heapreplace(best, score)
            else:
                continue
            yield index


def _thumbnail(pixels: Any, side: int) -> bytes:
    image = Image.fromarray(np.asarray(pixels.cpu() if hasattr(pixels, "cpu") else pixels))
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()
