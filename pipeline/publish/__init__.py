"""Consumer tables: the labels of a partition in few large, sorted files, as Delta Lake.

Reading what is labeled belongs to `commit`.
"""

from pipeline.publish.publishing import FILE_BYTES, Publication, TableBusyError, publish_labels
