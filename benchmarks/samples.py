"""What choosing windows costs beside encoding: CPU seconds of one thread, block after block.

    python -m benchmarks.samples data/demo/runs/l15-k32 data/demo/l15

The target is a pass of at most twice the encoder product. The first blocks cost most, since every window is new then.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch

from evaluate.analyses.samples.sampling import Choice, Sampling
from evaluate.rows.context_blocks import context_blocks
from evaluate.rows.windows import WindowShape
from matryoshka.checkpoints import find_checkpoint
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

BATCH_ROWS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--split", default="train", help="train has more rows; nothing is published")
    words = parser.parse_args()
    torch.set_num_threads(1)
    shards, transcoder = ShardSet.open(words.shards), Transcoder.load(find_checkpoint(words.run).folder)
    split, shape = shards.split(words.split), WindowShape(24, 15)
    sampling = Sampling(transcoder, shards, split, Choice(n_top=20, n_sampled=40, shape=shape, seed=0))
    encoder = whole = 0.0
    print(f"{'rows':>9} {'encoder s':>10} {'pass s':>8} {'ratio':>6} {'so far':>7}")
    for block in context_blocks(shards, split, shape):
        start = time.process_time()
        x = apply_convention(
            block.source.flatten(0, 1),
            transcoder.config.input,
            source_site=shards.manifest.source.site,
            norm=shards.norm,
        )
        for rows in x.split(BATCH_ROWS):
            transcoder.pre_acts(rows)
        middle = time.process_time()
        sampling.add(block)
        end = time.process_time()
        encoder, whole = encoder + middle - start, whole + end - middle
        ratio = (end - middle) / (middle - start)
        print(f"{sampling.n_rows:9,} {middle - start:10.2f} {end - middle:8.2f} {ratio:6.2f} {whole / encoder:7.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory {peak:.2f} GB, of which the kept windows {kept_bytes(sampling) / 1e9:.3f} GB")


def kept_bytes(sampling: Sampling) -> int:
    """Bytes of activations in kept windows; they do not grow with the rows."""
    n_kept = sampling.top.score.shape[1] + sampling.sample.score.shape[1]
    return len(sampling.top.score) * n_kept * sampling.shape.width * 4


if __name__ == "__main__":
    main()
