"""What a harvest costs on top of the language model's own forward pass. Prints one table.

    python -m benchmarks.harvest data/demo/inputs/model data/demo/inputs/text

(Not as a script: the folder of this file would come first on the path, and its name is that of the package.)

Speeds are of the time in which the model runs: a harvest of a few thousand tokens ends with a fraction of a second
(the last shard, statistics, fsync) that a long one does not notice. The contestants take turns in one process, and
each one's best round counts, since other programs can only make a round slower. The table has processor time too, of
all threads: on a CPU the background work takes the model's cores, and other programs disturb it less. A shard of 7
contexts still costs a dozen small files; those of a real set hold 64. Memory is the peak of a process of its own, of
shards of the same size.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from harvest.config import HarvestConfig
from harvest.estimate import Estimate
from harvest.run import harvest
from matryoshka.lm import LanguageModel
from matryoshka.shards import ShardSet
from matryoshka.shards.writer import measure_codec

# A harvest in a process of its own whose shards hold 2 contexts, so that 4 times the tokens are 4 times the shards.
SMALL_SHARDS = """
import sys
from matryoshka.shards import manifest
manifest.SHARD_BYTES, manifest.MIN_SHARDS = int(sys.argv.pop(1)), 1
from matryoshka.launch import harvest
harvest()
"""


Seconds = tuple[float, float]
"""On the clock, and of processor time of all threads."""


def clocks() -> Seconds:
    """Now."""
    return time.perf_counter(), time.process_time()


def per_token(begin: Seconds, end: Seconds, n_tokens: int) -> Seconds:
    """What passed between two moments, by tokens."""
    return (end[0] - begin[0]) / n_tokens, (end[1] - begin[1]) / n_tokens


class Stopwatch:
    """Progress that notes when the first and the last batch of a harvest came."""

    def __init__(self) -> None:
        self.begin, self.end, self.n_tokens = (0.0, 0.0), (0.0, 0.0), 0

    def started(self, estimate: Estimate, n_tokens_total: int) -> None:
        """The first shard is about to be made."""
        del estimate, n_tokens_total
        self.begin = clocks()

    def advanced(self, n_tokens: int, bytes_written: int) -> None:
        """A batch is through."""
        del bytes_written
        if n_tokens:
            self.n_tokens += n_tokens
            self.end = clocks()

    def noted(self, text: str) -> None:
        """What a person would be told."""
        print(text)

    @property
    def seconds_per_token(self) -> Seconds:
        """While the model runs: on the clock, and of all cores."""
        return per_token(self.begin, self.end, self.n_tokens)


def truncated(path: str, layer: int, dtype: torch.dtype) -> Any:
    """The Hugging Face model alone: no language-model head, no block after `layer`."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path, dtype=dtype).eval()
    model.layers = model.layers[: layer + 1]
    return model


def bare(model: Any, shards: ShardSet, batch_size: int) -> Seconds:
    """Seconds a token of the forward passes that made `shards`, on the same contexts in the same batches."""
    batches = []
    for split in (shards.train, shards.val):
        for shard in range(split.n_shards):
            batches += split.tokens(shard).long().split(batch_size)
    with torch.inference_mode():
        start = clocks()
        for batch in batches:
            model(batch, use_cache=False)
        return per_token(start, clocks(), sum(batch.numel() for batch in batches))


def speeds(args: argparse.Namespace, lm: LanguageModel, folder: Path) -> dict[str, Seconds]:
    """Best seconds a token of each contestant."""
    model = truncated(args.model, args.layer, lm.dtype)
    settings = {"model": args.model, "dataset": args.text, "tokens": args.tokens, "ctx_len": args.ctx_len}
    settings |= {"batch_size": args.batch_size, "dtype": "bf16", "device": "cpu", "val_fraction": 0.1}
    layers = {
        "harvest": {"layer": args.layer, "out": folder / "harvest"},
        "harvest x3": {"layers": [args.layer // 3, 2 * args.layer // 3, args.layer], "out": folder / "three"},
        "int8": {"layer": args.layer, "codec": "int8", "out": folder / "int8"},
    }
    best: dict[str, Seconds] = {}

    def note(name: str, found: Seconds) -> None:
        had = best.get(name, found)
        best[name] = (min(had[0], found[0]), min(had[1], found[1]))

    for _ in range(args.rounds):
        for name, where in layers.items():
            subprocess.run(["rm", "-rf", str(where["out"])], check=True)
            watch = Stopwatch()
            harvest(HarvestConfig.model_validate(settings | where), watch)
            note(name, watch.seconds_per_token)
            if name == "harvest":
                note("bare", bare(model, ShardSet.open(folder / "harvest"), args.batch_size))
    return best


def peak_memory(args: argparse.Namespace, n_contexts: int, folder: Path, width: int) -> int:
    """Peak resident bytes of a process that harvests `n_contexts` contexts in shards of 2."""
    options = ["--model", args.model, "--dataset", args.text, "--layer", str(args.layer), "--dtype", "bf16"]
    options += ["--tokens", str(n_contexts * args.ctx_len), "--ctx-len", str(args.ctx_len), "--device", "cpu"]
    options += ["--batch-size", str(args.batch_size), "--out", str(folder / f"memory{n_contexts}")]
    room = 2 * args.ctx_len * width * 2
    command = [sys.executable, "-c", SMALL_SHARDS, str(room), "run", *options, "--set", "harvest.val_fraction=0.1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def of_full_shards(path: Path) -> dict[str, float]:
    """What the codec did to the shards without padding, of which a small set has more than a large one."""
    shards = ShardSet.open(path)
    room = {split: plan.contexts for split, plan in shards.manifest.splits.items()}
    return measure_codec(shards.manifest, [r for r in shards.records if r.n_contexts == room[r.split]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--ctx-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=66 * 512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lm = LanguageModel.load(args.model, dtype="bf16", device="cpu")
    load = LanguageModel.load
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LanguageModel.load = classmethod(lambda *_, **__: lm)  # type: ignore[method-assign, assignment]
        try:
            best = speeds(args, lm, folder)
        finally:
            LanguageModel.load = load
        compact, int8 = (of_full_shards(folder / out) for out in ("harvest", "int8"))
        memory = [peak_memory(args, n, folder, lm.d_model) for n in (10, 40)]
    print(f"{args.model}, layer {args.layer}, bf16, ctx {args.ctx_len}, batch {args.batch_size}, {args.tokens} tokens")
    of_bare = [bare / ours for bare, ours in zip(best["bare"], best["harvest"], strict=True)]
    of_one = [three / one for three, one in zip(best["harvest x3"], best["harvest"], strict=True)]
    rows = [
        ("bare truncated HF forward", f"{1 / best['bare'][0]:.0f} tok/s", ""),
        ("harvest, one layer", f"{1 / best['harvest'][0]:.0f} tok/s", f"{of_bare[0]:.3f} of bare (>= 0.93)"),
        (
            "harvest, three layers",
            f"{1 / best['harvest x3'][0]:.0f} tok/s",
            f"{of_one[0]:.3f} of the time of one (<= 1.10)",
        ),
        ("the same of processor time", f"{1e6 * best['bare'][1]:.0f} us a token", f"{of_bare[1]:.3f}, {of_one[1]:.3f}"),
        ("peak memory, 10 contexts", f"{memory[0] / 1e6:.0f} MB", ""),
        ("peak memory, 40 contexts", f"{memory[1] / 1e6:.0f} MB", f"{memory[1] / memory[0]:.3f} (< 1.05)"),
        ("compact", f"{compact['compression_ratio']:.3f} of raw bf16", "(<= 0.72)"),
        ("int8", f"{int8['compression_ratio']:.3f} of raw bf16", "(<= 0.52)"),
        ("int8 error, source", f"{int8['source_error']:.2%}", "(<= 1%)"),
        ("int8 error, target", f"{int8['target_error']:.2%}", "(<= 1%)"),
    ]
    for what, value, ratio in rows:
        print(f"{what:28} {value:>20}   {ratio}")


if __name__ == "__main__":
    main()
