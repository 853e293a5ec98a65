"""Thumbnails for the gallery: of each class, the images with the highest and with the lowest confidence.

Classifiers make them, since only classifiers have both pixels and scores, and only of images that are among
the best k so far: of n images of a class, about k * ln(n / k) at each end. Labels don't depend on them.
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

#: Classes in the gallery, at most: the most frequent.
GALLERY_CLASSES = 1000

#: Values of the gallery's column `selection`.
HIGHEST_CONFIDENCE, LOWEST_CONFIDENCE = SELECTIONS = ("highest_confidence", "lowest_confidence")

#: Column of chunks.
THUMBNAIL_COLUMN = "thumbnail"
_QUALITY = 80


class Thumbnails:
    """Makes thumbnails of images that may get into the gallery.

    Args:
        count: number of images of each class that are kept at each end.
        side: longest side of a thumbnail, in pixels.
        most_classes: number of classes of which images are kept.
    """

    def __init__(self, count: int, side: int, most_classes: int = GALLERY_CLASSES) -> None:
        self._count, self._side, self._most_classes = count, side, most_classes
        self._lock = threading.Lock()  # a classifier has several chunks at once
        self._kept: dict[str, dict[int, list[float]]] = {selection: {} for selection in SELECTIONS}

    def added(self, decoded: Chunk, classified: Chunk) -> Chunk:
        """Returns the classified chunk with a column of thumbnails, null for most samples.

        The chunk before classification, `decoded`, has the pixels.
        """
        samples, pixels = classified.samples, decoded.pixels
        assert pixels is not None
        labeled = np.flatnonzero(pc.is_valid(samples["label_id"]).to_numpy())
        labels = samples["label_id"].drop_null().to_numpy()
        scores = samples["score"].drop_null().to_numpy()
        with self._lock:
            wanted = {place for selection in SELECTIONS for place in self._better(selection, labels, scores)}
        # The place of a row's pixels: rows that could not be decoded have none.
        place_of = np.cumsum(pc.is_null(decoded.samples["error"]).to_numpy()) - 1
        pictures: list[bytes | None] = [None] * samples.num_rows
        for row in labeled[sorted(wanted)].tolist():
            pictures[row] = _thumbnail(pixels[int(place_of[row])], self._side)
        return replace(
            classified, samples=samples.append_column(THUMBNAIL_COLUMN, pa.array(pictures, pa.binary()))
        )

    def _better(self, selection: str, labels: np.ndarray, scores: np.ndarray) -> Iterator[int]:
        """Places of the images that are among the best of their class so far."""
        kept = self._kept[selection]
        pairs = zip(labels.tolist(), rank_scores(selection, scores).tolist(), strict=True)
        for place, (label, score) in enumerate(pairs):
            if label not in kept and len(kept) >= self._most_classes:
                continue
            best = kept.setdefault(label, [])
            if len(best) < self._count:
                heapq.heappush(best, score)
            elif score > best[0]:
                heapq.heapreplace(best, score)
            else:
                continue
            yield place


def rank_scores(selection: str, scores: Any) -> Any:
    """Scores, negated for the lowest confidence: a higher value is better."""
    return scores if selection == HIGHEST_CONFIDENCE else -scores


def _thumbnail(pixels: Any, side: int) -> bytes:
    image = Image.fromarray(np.asarray(pixels.cpu() if hasattr(pixels, "cpu") else pixels))
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()
