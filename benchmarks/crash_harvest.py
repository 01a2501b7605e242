"""Harvests that are killed at random moments, and shard sets with a flipped bit: how often is the end result right?

    python -m benchmarks.crash_harvest MODEL TEXT --kills 30 --flips 100

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
from dataclasses import dataclass
from pathlib import Path

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet
from matryoshka.shards.verify import verify

# A harvest whose shards are small, so that there are about a hundred of them to be killed between.
SMALL_SHARDS = """
import sys
from matryoshka.shards import manifest
manifest.SHARD_BYTES = int(sys.argv.pop(1))
from matryoshka.launch import harvest
harvest()
"""


def files(path: Path) -> dict[str, bytes]:
    """Name -> content of every file of a set."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def command(args: argparse.Namespace, out: Path) -> list[str]:
    """One harvest of about 100 shards."""
    options = ["--model", args.model, "--dataset", args.text, "--layer", str(args.layer), "--tokens", args.tokens]
    options += ["--ctx-len", str(args.ctx_len), "--batch-size", "4", "--dtype", "fp32", "--device", "cpu"]
    options += ["--out", str(out), "--set", "harvest.val_fraction=0.1"]
    return [sys.executable, "-c", SMALL_SHARDS, str(args.shard_bytes), "run", *options]


@dataclass(frozen=True)
class Pace:
    """How long an uninterrupted harvest takes, in seconds."""

    load: float
    """From the start of the process until it has loaded the model, made the folder and said its estimate."""
    first: float
    """From there until the first shard is committed."""
    shard: float
    """From one commit to the next."""
    finish: float
    """From the last commit to the end of the process."""
    n_shards: int


def n_committed(path: Path) -> int:
    """Commit records in a set."""
    return len(list(path.glob("manifest/*.json")))


def until_it_writes(process: subprocess.Popen[str]) -> None:
    """Until the harvest has said its estimate: the folder is made, and the first shard about to be."""
    assert process.stderr is not None
    for line in process.stderr:
        if "tokens to harvest" in line:
            return


def until_it_commits(process: subprocess.Popen[str], out: Path, n_before: int) -> None:
    """Until it has committed a shard more, or has ended."""
    while process.poll() is None and n_committed(out) <= n_before:
        time.sleep(0.002)


def undisturbed(args: argparse.Namespace, folder: Path, wanted: Path) -> Pace:
    """Make the set to compare with."""
    start = time.monotonic()
    with subprocess.Popen(command(args, wanted), cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        until_it_writes(process)
        moments = [time.monotonic()]
        until_it_commits(process, wanted, 0)
        moments.append(time.monotonic())
        last = moments[-1]
        seen = n_committed(wanted)
        while process.poll() is None:
            if n_committed(wanted) > seen:
                seen, last = n_committed(wanted), time.monotonic()
            time.sleep(0.002)
        end = time.monotonic()
        process.communicate()
    assert process.returncode == 0
    return Pace(moments[0] - start, moments[1] - moments[0], (last - moments[1]) / max(1, seen - 1), end - last, seen)


def kill_at_random(args: argparse.Namespace, folder: Path, draw: random.Random) -> None:
    """The kills: one in six between loading the model and the end, the others after the process has committed a shard,
    at random moments until an uninterrupted one would have ended."""
    wanted, out = folder / "wanted", folder / "out"
    pace = undisturbed(args, folder, wanted)
    kinds = {"before a commit of its own": 0, "between its first commit and the last": 0, "while finishing": 0}
    committed: list[int] = []
    while len(committed) < args.kills:
        before = n_committed(out)
        with subprocess.Popen(command(args, out), cwd=folder, stderr=subprocess.PIPE, text=True) as process:
            rest = (pace.n_shards - before) * pace.shard
            if draw.random() < 1 / 6 or before == pace.n_shards:
                time.sleep(pace.load * draw.uniform(0.7, 1) + draw.uniform(0, pace.first + rest + pace.finish))
            else:
                until_it_writes(process)
                until_it_commits(process, out, before)
                # Not evenly until the end, or a set would be done after two kills.
                time.sleep(
                    draw.choice([draw.uniform(0, min(rest, 10 * pace.shard)), draw.uniform(0, rest + pace.finish)])
                )
            killed = process.poll() is None
            process.kill()
        if killed:
            n = n_committed(out)
            committed.append(n)
            kinds[list(kinds)[0 if n == before < pace.n_shards else 2 if n == pace.n_shards else 1]] += 1
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
    print(f"kill -9: {len(committed)} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})")
    print(f"shards committed at each, of {pace.n_shards}: {committed}")
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
    parser.add_argument("--shard-bytes", type=int, default=9216, help="a side; 12 contexts of the tests' tiny model")
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
