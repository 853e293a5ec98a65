"""The gallery: of each class, small pictures of the images that the model is surest of, and least sure of.

Classifiers make the thumbnails, since only they have both pixels and scores, of those images alone that
beat what they have seen: with n images of a class, about k * ln(n / k) for each end. The driver keeps the
best k of what is committed, in `gallery.parquet`. No label depends on any of it.
"""

from __future__ import annotations

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

#: The surest and the least sure.
#: Of a model with more classes, only so many are in the gallery: the most frequent.
GALLERY_CLASSES = 1000

MOST, LEAST = ENDS = ("most", "least")


SCHEMA = pa.schema(
    [
        ("label_id", pa.int32()),
        ("label", pa.string()),
        ("end", pa.string()),
        ("score", pa.float32()),
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("key", pa.string()),
        ("thumbnail", pa.binary()),
    ]
)


COLUMN = "thumbnail"

_QUALITY = 80


# Thumbnails in the driver's hands before it drops those that others have surpassed.
MOST_HELD = 8 * GALLERY_CLASSES * len(ENDS)


class Thumbnails:
    """Makes thumbnails, in a classifier, of images that may come into the gallery.

    Args:
        count: images of each class that are kept at each end.
        side: pixels of a thumbnail's longest side.
        classes: of the model.
    """

    def __init__(self, count: int, side: int, classes: int) -> None:
        self._count, self._side = count, side
        self._lock = threading.Lock()  # a classifier has several chunks at once
        self._kept: dict[str, dict[int, list[float]]] = {end: {} for end in ENDS}
        # What a score has to beat, by class.
        self._bars = {end: np.full(classes, -np.inf, np.float32) for end in ENDS}

    def added(self, decoded: Chunk, classified: Chunk) -> Chunk:
        """A classified chunk with a column of thumbnails, null for most samples.

        Args:
            decoded: the same chunk, as it came to the classifier, with its pixels.
            classified: what came of it.
        """
        samples, pixels = classified.samples, decoded.pixels
        assert pixels is not None
        labelled = np.flatnonzero(pc.is_valid(samples["label_id"]).to_numpy())
        labels = samples["label_id"].drop_null().to_numpy()
        scores = samples["score"].drop_null().to_numpy()
        with self._lock:
            wanted = {place for end in ENDS for place in self._better(end, labels, scores)}
        # Where a row's pixels are: only those rows have any that were decoded.
        place_of = np.cumsum(pc.is_null(decoded.samples["error"]).to_numpy()) - 1
        pictures: list[bytes | None] = [None] * samples.num_rows
        for row in labelled[sorted(wanted)].tolist():
            pictures[row] = _thumbnail(pixels[int(place_of[row])], self._side)
        return replace(classified, samples=samples.append_column(COLUMN, pa.array(pictures, pa.binary())))

    def _better(self, end: str, labels: np.ndarray, scores: np.ndarray) -> Iterator[int]:
        """Places of those that are among the best of their class up to now."""
        kept, bars = self._kept[end], self._bars[end]
        scores = ranked(end, scores)
        for place in np.flatnonzero(scores > bars[labels]).tolist():
            label, score = int(labels[place]), float(scores[place])
            if label not in kept and len(kept) >= GALLERY_CLASSES:
                continue
            best = kept.setdefault(label, [])
            if len(best) < self._count:
                heapq.heappush(best, score)
            elif score > best[0]:
                heapq.heapreplace(best, score)
            else:
                continue
            if len(best) == self._count:
                bars[label] = best[0]
            yield place


def ranked(end: str, scores: Any) -> Any:
    """Scores, turned round for the least sure: the higher, the better."""
    return scores if end == MOST else -scores


def _thumbnail(pixels: Any, side: int) -> bytes:
    image = Image.fromarray(np.asarray(pixels.cpu() if hasattr(pixels, "cpu") else pixels))
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()
