"""Lists shards in object storage, and reads shards of each format as chunks of encoded samples.

Images are not decoded in this package.
"""

from pipeline.read.chunks import NO_SAMPLES, Chunk, failed_chunk, sample_table, split_into_chunks
from pipeline.read.division import divide_files, overlap, whole_file
from pipeline.read.downloads import read_images
from pipeline.read.listing import list_input_shards, list_shards
from pipeline.read.reader import list_samples, read_samples, select_images
from pipeline.read.samples import ReadOptions, Sample, complete_sample
from pipeline.read.shards import MAX_IGNORED_EXAMPLES, IgnoreReason, NoShardsError, Shard, ShardListing
from pipeline.read.targets import load_targets
