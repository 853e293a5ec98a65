"""The HTML report and the gallery of a partition, from stored labels, manifest and records.

Metrics are computed in `statistics`, comparisons in `compare`.
"""

from pipeline.report.gallery import GALLERY_FILE, GALLERY_SCHEMA, Gallery, read_gallery, write_gallery
from pipeline.report.page import write_report
