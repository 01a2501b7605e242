"""Harvests that are killed at random moments, and shard sets with a flipped bit: how often is the end result right?

    python benchmarks/crash_harvest.py MODEL TEXT --kills 30 --flips 100

Every kill -9 is followed by the same command, which is killed in turn; the last one runs to its end, and what it leaves
is compared, file by file, with a harvest that nobody killed. Then single bits of the files of that set are flipped, one
after the other, and `harvest verify` has to name the shard.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.shards.verify import verify


def files(path: Path) -> dict[str, bytes]:
    """Name -> content of every file of a set."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def command(args: argparse.Namespace, out: Path) -> list[str]:
    """One harvest of about 100 shards, so that there is something to interrupt."""
    options = ["--model", args.model, "--dataset", args.text, "--layer", str(args.layer), "--tokens", args.tokens]
    options += ["--ctx-len", str(args.ctx_len), "--batch-size", "4", "--dtype", "fp32", "--device", "cpu"]
    return [sys.executable, "-m", "harvest", "run", *options, "--out", str(out), "--set", "harvest.val_fraction=0.1"]


def until_it_writes(process: subprocess.Popen[str]) -> None:
    """Until the harvest has said its estimate: the model is loaded, and the first shard about to be made."""
    assert process.stderr is not None
    for line in process.stderr:
        if "tokens to harvest" in line:
            return


def kill_at_random(args: argparse.Namespace, folder: Path, draw: random.Random) -> None:
    """The kills, at random moments of the time in which an uninterrupted harvest makes and finishes its shards."""
    wanted, out = folder / "wanted", folder / "out"
    with subprocess.Popen(command(args, wanted), cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        until_it_writes(process)
        started = time.monotonic()
        process.communicate()
        writing = time.monotonic() - started
    assert process.returncode == 0
    n_shards = len(list(wanted.glob("manifest/*.json")))
    committed = []
    while len(committed) < args.kills:
        left = 1 - len(list(out.glob("manifest/*.json"))) / n_shards
        with subprocess.Popen(command(args, out), cwd=folder, stderr=subprocess.PIPE, text=True) as process:
            until_it_writes(process)
            time.sleep(writing * draw.uniform(0, 0.2 + 0.8 * left))
            killed = process.poll() is None
            process.kill()
        if killed:
            committed.append(len(list(out.glob("manifest/*.json"))))
        else:
            # It was done before its end came: compare, and begin anew.
            assert files(out) == files(wanted), "a set that was killed and continued differs"
            subprocess.run(["rm", "-rf", str(out)], check=True)
    subprocess.run(command(args, out), check=True, capture_output=True, cwd=folder)
    found = files(out)
    whole_set = files(wanted)
    names = sorted({*found, *whole_set})
    other = [name for name in names if found.get(name) != whole_set.get(name)]
    same = not other
    print(f"kill -9: {len(committed)}, shards committed at each: {committed}")
    print(
        f"the set in the end: {len(found)} files, {'all equal to' if same else 'DIFFERENT from'} the uninterrupted one"
    )
    assert same, other


def flip_bits(args: argparse.Namespace, path: Path, draw: random.Random) -> None:
    """The flips. Bytes are drawn evenly over all files, so large files get most."""
    records = ShardSet.open(path).records
    sizes = [(record, key, file.size) for record in records for key, file in sorted(record.files.items())]
    n_named, n_refused = 0, 0
    for _ in range(args.flips):
        record, key, size = draw.choices(sizes, weights=[size for *_, size in sizes])[0]
        content = (path / key).read_bytes()
        bit = draw.randrange(8 * size)
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (path / key).write_bytes(bytes(changed))
        verdict = verify(path)
        n_named += [(d.split, d.shard) for d in verdict.damage] == [(record.split, record.shard)]
        try:
            ShardSet.open(path, verify=True)
        except UserError:
            n_refused += 1
        (path / key).write_bytes(content)
    print(f"single bits flipped: {args.flips}, exactly that shard named by verify: {n_named}")
    print(f"refused by a reader that is asked to check: {n_refused}")
    assert n_named == n_refused == args.flips
    assert verify(path).is_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--tokens", default="20k")
    parser.add_argument("--ctx-len", type=int, default=16)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.model, args.text = (str(Path(name).resolve()) for name in (args.model, args.text))
    with tempfile.TemporaryDirectory() as folder:
        kill_at_random(args, Path(folder), random.Random(args.seed))
        flip_bits(args, Path(folder) / "wanted", random.Random(args.seed))


if __name__ == "__main__":
    main()
