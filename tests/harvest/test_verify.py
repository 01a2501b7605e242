"""`harvest verify`, `harvest info` and `harvest plan` on a set that was harvested."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harvest.repair import recorded_config
from harvest.run import plan
from matryoshka.shards import ShardSet

Cli = Callable[..., tuple[int, str, str]]


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def made(finished: Path, tmp_path: Path) -> Path:
    """A finished set that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "l1"))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def test_a_whole_set_is_whole(made: Path, cli: Cli) -> None:
    before = files(made)
    code, out, err = cli("verify", str(made))
    assert (code, err) == (0, "")
    size = sum(file.size for record in ShardSet.open(made).records for file in record.files.values())
    assert re.fullmatch(rf"{made}: whole \(10 of 10 shards, {size / 1e6:.0f} MB read\)\n", out)
    assert cli("verify", str(made), "--repair")[0] == 0
    assert files(made) == before


def test_bad_shards_are_named_and_repaired_alone(made: Path, cli: Cli) -> None:
    before = files(made)
    times = {p: p.stat().st_mtime_ns for p in made.glob("train/*/c/**/*") if p.is_file()}
    flip(made / "train/source/c/3/0/0/0", 1234)
    (made / "train/target/c/5/0/0/0").unlink()
    (made / "val/tokens/c/0/0/0").write_bytes(b"")
    (made / "manifest/train-00007.json").unlink()
    (made / "train/doc_ids/zarr.json").write_text("{}")
    code, out, _ = cli("verify", str(made))
    assert code == 1
    for part in (
        "shard 3 of train differs from its checksum in train/source/c/3/0/0/0",
        "shard 5 of train misses train/target/c/5/0/0/0",
        "shard 0 of val has 0 bytes in val/tokens/c/0/0/0, not ",
        "shard 7 of train has lost its commit record manifest/train-00007.json",
        "the metadata train/doc_ids/zarr.json is not what the set was finished with",
        "4 bad shards (9 of 10 shards, ",
    ):
        assert part in out
    assert len(out.splitlines()) == 6
    code, out, err = cli("verify", str(made), "--repair", "--batch-size", "3", "--device", "cpu")
    assert code == 0, err
    assert "4 shards harvested again" in out
    assert out.endswith("MB read)\n")
    assert files(made) == before
    for path, when in times.items():
        if path.relative_to(made).parts[3] not in ("3", "5", "7"):
            assert path.stat().st_mtime_ns == when, path


@pytest.mark.parametrize("seed", range(3))
def test_single_flipped_bits_are_found(seed: int, made: Path, cli: Cli) -> None:
    """benchmarks/crash_harvest.py flips a hundred."""
    draw = random.Random(seed)
    record = draw.choice(ShardSet.open(made).records)
    key = draw.choice(sorted(record.files))
    flip(made / key, draw.randrange(8 * record.files[key].size))
    code, out, _ = cli("verify", str(made))
    assert code == 1
    assert f"shard {record.shard} of {record.split} differs from its checksum in {key}" in out


def test_damaged_statistics_are_repaired(made: Path, cli: Cli) -> None:
    before = files(made)
    flip(made / "stats/source/mean/c/0", 5)
    code, out, _ = cli("verify", str(made))
    assert code == 1
    assert "the statistics of the set are not: the set differs from its checksum in stats/source/mean/c/0" in out
    assert cli("verify", str(made), "--repair")[0] == 0
    assert files(made) == before


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"n_rows": 3}, "has n_rows = 420, and its commit record says 3"),
        ({"n_documents": 99}, "and its commit record says 99"),
        ({"largest": {"source": 1.0, "target": 2.0}}, "its commit record says {'source': 1.0"),
        ({"n_contexts": 24}, "holds 24 contexts, and the manifest says 28"),
        ({"nonfinite": 1}, "has a bad commit record: "),
        ({"colour": "red"}, "has a bad commit record: "),
        ({"files": {}}, "does not vouch for exactly the files of its shard"),
    ],
)
def test_records_are_held_against_what_they_stand_for(changes: dict[str, Any], what: str, made: Path, cli: Cli) -> None:
    edit(made / "manifest/train-00002.json", **changes)
    code, out, _ = cli("verify", str(made))
    assert code == 1
    assert "shard 2 of train" in out
    assert what in out


def rewrite(path: Path, split: str, shard: int, name: str, change: Callable[[Any], None]) -> None:
    """Change an array through zarr and make its record vouch for the new file: wrong, but not by accident."""
    import zarr

    from matryoshka.shards.checksum import checksum

    root: Any = zarr.open_group(str(path), mode="r+", use_consolidated=False)
    array = root[f"{split}/{name}"].with_config({"write_empty_chunks": True})
    values = array[shard]
    change(values)
    array[shard] = values
    record = path / "manifest" / f"{split}-{shard:05d}.json"
    content = json.loads(record.read_text())
    for key in content["files"]:
        content["files"][key] = checksum(path / key).model_dump()
    record.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("source", 0x7FC0, "has 1 values of source that are not finite"),
        ("target", 0xFF80, "has 1 values of target that are not finite"),
        ("tokens", 5, "has a context that does not start with the BOS token 2"),
        ("doc_ids", 40, "has documents that are not in order"),
    ],
)
def test_content_is_checked_too(name: str, value: int, what: str, made: Path, cli: Cli) -> None:
    def change(values: Any) -> None:
        values[(0,) * values.ndim] = value

    rewrite(made, "train", 4, name, change)
    code, out, _ = cli("verify", str(made))
    assert code == 1
    assert f"shard 4 of train {what}" in out


def test_tokens_of_another_tokenizer_are_found(made: Path, cli: Cli) -> None:
    def change(values: Any) -> None:
        values[1, 3] = 97

    rewrite(made, "val", 0, "tokens", change)
    assert "has token ids from 2 to 97; the tokenizer has 0 to 97" in cli("verify", str(made))[1]


def test_an_unfinished_set_is_work_not_damage(made: Path, cli: Cli, arguments: list[str]) -> None:
    before = files(made)
    (made / "manifest/train-00006.json").unlink()
    edit_root = json.loads((made / "zarr.json").read_text())
    edit_root["attributes"] |= {"complete": False, "summary": {}}
    (made / "zarr.json").write_text(json.dumps(edit_root))
    code, out, _ = cli("verify", str(made))
    assert code == 0
    assert "what is there is whole, but the set is unfinished (9 of 10 shards" in out
    assert cli(*arguments, "--out", str(made))[0] == 0
    assert files(made) == before


def test_what_is_no_shard_set(cli: Cli, tmp_path: Path) -> None:
    for command in ("verify", "info"):
        code, _, err = cli(command, str(tmp_path))
        assert code == 2
        assert "is not a shard set" in err


def test_repair_says_when_the_model_is_gone(made: Path, cli: Cli, tmp_path: Path) -> None:
    root = json.loads((made / "zarr.json").read_text())
    root["attributes"]["settings"]["dataset"] = str(tmp_path / "gone")
    (made / "zarr.json").write_text(json.dumps(root))
    flip(made / "train/source/c/3/0/0/0", 1234)
    code, out, err = cli("verify", str(made), "--repair")
    assert code == 2
    assert "shard 3 of train" in out
    assert "gone does not exist" in err


# info


def test_what_is_printed_is_readable(made: Path, tmp_path: Path, check_readable: Callable[..., None]) -> None:
    (tmp_path / "set").symlink_to(made)
    check_readable([["harvest", "info", "set"], ["harvest", "verify", "set"]], tmp_path)


def test_info_is_about_what_is_there(made: Path, cli: Cli) -> None:
    import numpy as np

    before = files(made)
    code, out, err = cli("info", str(made))
    assert (code, err) == (0, f"next: train run --shards {made}\n")
    text = " ".join(re.sub(r"[^\x20-\x7e\n]", " ", out).split())
    shards = ShardSet.open(made)
    ids = {int(i) for s in range(shards.train.n_shards) for i in shards.train.doc_ids(s).unique()}
    for part in (
        "model ",
        "resid_mid of layer 1, 24 wide (blocks.1.hook_resid_mid)",
        "mlp_out of layer 1, 24 wide (blocks.1.hook_mlp_out)",
        "rms, eps 1e-06",
        "4,000 in 250 contexts of 16",
        f"225 contexts in 9 shards, 3,375 rows without special tokens, of {len(ids)} documents",
        "bytes per token",
        "of raw bfloat16",
    ):
        assert part in text, part
    for side in ("source", "target"):
        rows = np.concatenate(
            [shards.train.activations(side, s)[shards.train.keep(s)].float().numpy() for s in range(9)]
        ).astype(np.float64)
        norms = np.linalg.norm(rows, axis=1)
        ratio = np.linalg.norm(rows.mean(0)) / np.sqrt(rows.var(0).sum())
        assert f"{side}: ||mean|| / ||std|| {ratio:.3f}" in text
        assert f"{side}: sink rows (> 10x median) {(norms > 10 * np.median(norms)).mean():.3%}" in text
        largest = max(float(np.abs(rows).max()), max(r.largest[side] for r in shards.records))
        assert f"{side}: largest |x| {largest:.5g} (fits float16)" in text
        assert f"{np.median(norms):.4g}" in text
    assert files(made) == before


def test_info_of_the_lossy_codec_tells_its_error(cli: Cli, arguments: list[str], tmp_path: Path) -> None:
    code, _, said = cli(*arguments, "--codec", "int8", "--out", str(tmp_path / "q"))
    assert code == 0, said
    assert re.search(r"activations take 0\.\d+ of raw bfloat16, relative error of source 0\.\d\d%, target 0", said)
    assert "error of int8" in cli("info", str(tmp_path / "q"))[1]
    assert cli("verify", str(tmp_path / "q"))[0] == 0


# plan


def test_plan_writes_nothing(cli: Cli, arguments: list[str], tmp_path: Path) -> None:
    command = ["plan", *arguments[1:], "--out", str(tmp_path / "out")]
    code, out, err = cli(*command)
    assert code == 0
    assert err.startswith("next: harvest run ")
    assert re.fullmatch(r"4,000 tokens to harvest: about \d+ MB on disk \(.* free\), about \d+:\d\d:\d\d\n", out)
    assert list(tmp_path.iterdir()) == []


def test_plan_says_that_the_text_is_too_short(cli: Cli, arguments: list[str], tmp_path: Path) -> None:
    code, _, err = cli("plan", *arguments[1:], "--tokens", "40k", "--out", str(tmp_path / "out"))
    assert code == 0
    found = re.match(r"the text is shorter than --tokens: val has (\d+) of the 250 contexts that were planned", err)
    assert found is not None, err
    assert 0 < int(found[1]) < 250


def test_plan_is_of_what_is_missing_and_exact_once_a_shard_is_there(made: Path, cli: Cli, arguments: list[str]) -> None:
    """The bytes to 5 percent, from the bytes per token of what is there."""
    records = ShardSet.open(made).records
    missing = [record for record in records if record.name != "train-00000.json"]
    for record in missing:
        (made / "manifest" / record.name).unlink()
    found = plan(recorded_config(made, {"device": "cpu"}))
    assert found.n_tokens == 3552
    assert found.n_bytes == pytest.approx(sum(f.size for r in missing for f in r.files.values()), rel=0.05)
    assert cli(*arguments, "--out", str(made))[0] == 0
    assert cli("plan", *arguments[1:], "--out", str(made))[1].startswith("0 tokens to harvest: about 0 MB")
