"""The dataflow: shards, reading, decoding, classifying, committing, statistics."""
