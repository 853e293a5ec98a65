"""Find the images that are most similar to one image, by the cosine similarity of their embeddings.

    python examples/nearest_neighbors.py OUTPUT/model=<name>-<fingerprint> KEY

The partition needs embeddings: label the images with `--set output.embedding=float16`. The search compares
the query with every image and holds one shard in memory. For many queries, use a vector index.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import Partition, open_partition


def read_embeddings(partition: Partition) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Yields the rows of each shard and their embeddings of length 1, float32 (rows, width)."""
    for table in partition.read_labels(["shard", "key", "label", "embedding"]):
        rows = table.filter(pc.is_valid(table["embedding"]))  # rows with an error have no embedding
        if rows.num_rows:
            flat = rows["embedding"].combine_chunks().flatten().to_numpy()
            vectors = flat.reshape(rows.num_rows, -1).astype(np.float32)
            yield rows, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def find_query(partition: Partition, key: str) -> np.ndarray:
    """Returns the embedding (width,) of the first image with a key."""
    for rows, vectors in read_embeddings(partition):
        position = pc.index(rows["key"], key).as_py()
        if position >= 0:
            return vectors[position]
    raise SystemExit(f"{partition.uri}: no image with an embedding has the key {key!r}")


def main() -> None:
    """Prints the nearest neighbors of the query, the most similar first."""
    parser = argparse.ArgumentParser(description="Find the images that are most similar to one image.")
    parser.add_argument("partition", help="folder or URI of the labels of one model")
    parser.add_argument("key", help="key of the query image")
    parser.add_argument("--count", type=int, default=5, help="number of neighbors (default: 5)")
    arguments = parser.parse_args()

    partition = open_partition(arguments.partition)
    query = find_query(partition, arguments.key)
    best: list[tuple[float, str, str, str]] = []
    for rows, vectors in read_embeddings(partition):
        similarities = vectors @ query
        top = np.argsort(-similarities)[: arguments.count + 1]  # one more, because the query finds itself
        columns = (rows[name].take(top).to_pylist() for name in ("shard", "key", "label"))
        best = sorted([*best, *zip(similarities[top].tolist(), *columns, strict=True)], reverse=True)
        best = best[: arguments.count + 1]
    for similarity, shard, key, label in best:
        print(f"{similarity:.4f}  {label:<20}  {key}  in {shard}")


if __name__ == "__main__":
    main()
