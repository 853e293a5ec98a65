"""Consumer tables: the labels of a partition in few large, sorted files, as a Delta Lake table.

Reading labels from prediction files belongs to `commit`.
"""

from pipeline.publish.publishing import FILE_BYTES, Publication, TableBusyError, publish_labels
