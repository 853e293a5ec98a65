"""The HTML report and the gallery of a partition.

Figures are computed in `statistics`; nothing here decides about a run.
"""

from pipeline.report.gallery import FILE_NAME, Gallery, Item, read_gallery, write_gallery
from pipeline.report.page import make_report

__all__ = ["FILE_NAME", "Gallery", "Item", "make_report", "read_gallery", "write_gallery"]
