"""The HTML report and the gallery of a partition, from what is stored.

Figures are computed in `statistics`, comparisons in `compare`.
"""

from pipeline.report.gallery import GALLERY_FILE, Gallery, Item, read_gallery, write_gallery
from pipeline.report.page import write_report
