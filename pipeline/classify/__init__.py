"""Classifies decoded images: prediction columns, and thumbnails for the gallery.

`classify.checkpoint` opens checkpoints and is imported by its module name.
"""

from pipeline.classify.predict import classify
from pipeline.classify.thumbnails import (
    GALLERY_CLASSES,
    HIGHEST_CONFIDENCE,
    LOWEST_CONFIDENCE,
    THUMBNAIL_COLUMN,
    Thumbnails,
)
