"""THE shard-set format and its only owner: the one package that imports zarr.

A shard set is a folder such as data/l17 that anyone can open with `zarr.open`:

    train/tokens   int32  [n_shards, contexts, ctx_len]          the language model's input
    train/doc_ids  int32  [n_shards, contexts, ctx_len]          which document each token came from
    train/source   uint16 [n_shards, ctx_len, contexts, d_in]    bfloat16 bits, position-major
    train/target   uint16 [n_shards, ctx_len, contexts, d_out]   (int8 with factors beside it: codec int8, scaled.py)
    val/...        the same arrays, from documents that train never saw
    stats/...      float64 mean and variance per site, row norms, over the train split
    norm/...       float32 gain (and bias) of the norm behind the source site
    manifest/      one JSON commit record per shard, written last of all

`source[s, p, c]` belongs to `tokens[s, c, p]`. The root attributes are the manifest. Presence comes from the commit
records and integrity from their crc32c, never from Zarr: a Zarr chunk that was never written reads back as zeros.
"""

from matryoshka.shards.manifest import CommitRecord, Manifest, SiteFacts, SplitPlan, extend_splits, plan_splits
from matryoshka.shards.reader import Block, ShardSet, Split
from matryoshka.shards.writer import ShardSetWriter

__all__ = [
    "Block",
    "CommitRecord",
    "Manifest",
    "ShardSet",
    "ShardSetWriter",
    "SiteFacts",
    "Split",
    "SplitPlan",
    "extend_splits",
    "plan_splits",
]
