"""From object storage to chunks of encoded samples: listing shards and reading each format.

Nothing is decoded here.
"""

from pipeline.read.chunks import Chunk, split_into_chunks
from pipeline.read.reader import read_samples
from pipeline.read.samples import ReadOptions, Sample
from pipeline.read.shards import (
    IgnoreReason,
    NoShardsError,
    Shard,
    ShardListing,
    list_input_shards,
    list_shards,
)
