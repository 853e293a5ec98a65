"""Consumer tables: the labels of a partition as rows of a Delta Lake or Iceberg table.

Each format's own library writes the data files and commits the transaction. The table is the only state: its
rows show which shards are published, in which version.
"""

from pipeline.publish.publishing import Publication, TableBusyError, publish_labels
