"""Consumer tables: labels of a partition in few large files, through each format's own library.

Reading what is labeled belongs to `commit`.
"""

from pipeline.publish.parquet_table import ParquetTable
from pipeline.publish.publishing import FILE_BYTES, ConsumerTable, Publication, TableBusyError, publish

__all__ = ["FILE_BYTES", "ConsumerTable", "ParquetTable", "Publication", "TableBusyError", "publish"]
