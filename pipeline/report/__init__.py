"""The HTML report and the gallery of a partition, from stored labels, manifest and records.

Metrics are computed in `statistics`, comparisons in `compare`.
"""

from pipeline.report.gallery import GALLERY_FILE, GALLERY_SCHEMA, Gallery, encode_gallery, read_gallery
from pipeline.report.page import render_report
