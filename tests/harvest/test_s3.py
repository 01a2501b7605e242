"""A harvest into an object store, over the S3 protocol on the loopback: made, killed, repaired, grown, trained on."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from warm_processes import WarmPython

from matryoshka import launch
from matryoshka.shards import ShardSet
from matryoshka.shards.storage_object import ObjectStorage
from matryoshka.shards.storage_open import open_storage

Cli = Callable[..., tuple[int, str, str]]


def content(url: str) -> dict[str, bytes | None]:
    storage = open_storage(url)
    assert isinstance(storage, ObjectStorage)
    keys = list(storage._listed(""))
    return dict(zip(keys, storage.read_all(keys), strict=True))


def files(path: Path) -> dict[str, bytes]:
    """Without the file that holds the lock of a folder."""
    found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    del found["manifest/.lock"]
    return found


def test_the_set_is_that_of_a_folder_and_every_command_knows_it(
    cli: Cli, arguments: list[str], finished: Path, s3_bucket: str
) -> None:
    url = f"{s3_bucket}/sets/l1"
    code, said, _ = cli("plan", *arguments[1:], "--out", url)
    assert code == 0
    assert "about" in said
    assert "free" not in said
    code, _, said = cli(*arguments, "--out", url)
    assert code == 0, said
    assert f"{url}: 10 shards written (4,000 tokens" in said
    assert content(url) == files(finished)
    code, _, said = cli(*arguments, "--out", url)
    assert (code, "nothing left to do (4,000 tokens" in said) == (0, True)
    code, said, _ = cli("info", url)
    assert code == 0
    assert "resid_mid of layer 1" in said
    code, said, _ = cli("verify", url)
    assert (code, f"{url}: whole (10 of 10 shards" in said) == (0, True)
    code, _, said = cli(*arguments, "--out", url, "--seed", "9")
    assert (code, f"{url} was harvested with other settings (seed: 0 -> 9)" in said) == (2, True)


def test_a_flipped_bit_is_named_and_repaired(cli: Cli, finished: Path, s3_bucket: str) -> None:
    url = f"{s3_bucket}/l1"
    storage = open_storage(url)
    for key, value in files(finished).items():
        storage.publish(key, value)
    before = content(url)
    key = "train/target/c/4/0/0/0"
    storage.publish(key, bytes([(storage.read(key) or b"")[0] ^ 1, *(storage.read(key) or b"")[1:]]))
    code, said, _ = cli("verify", url)
    assert code == 1
    assert f"{url}: shard 4 of train differs from its checksum in {key}" in said
    code, said, _ = cli("verify", url, "--repair", "--device", "cpu", "--batch-size", "3")
    assert code == 0, said
    assert f"{url}: 1 shards harvested again" in said
    assert content(url) == before


def test_more_tokens_and_several_sets(cli: Cli, arguments: list[str], s3_bucket: str, tmp_path: Path) -> None:
    several = [word for word in arguments if word not in ("--layer", "1")]
    for tokens in ("2k", "4k"):
        several[several.index("--tokens") + 1] = tokens
        for out in (f"{s3_bucket}/sets", str(tmp_path / "sets")):
            code, _, said = cli(*several, "--layers", "0,1", "--out", out)
            assert code == 0, said
    for name in ("l0", "l1"):
        assert content(f"{s3_bucket}/sets/{name}") == files(tmp_path / "sets" / name)


@pytest.mark.kill
def test_killed_and_continued(
    arguments: list[str], finished: Path, s3_bucket: str, tmp_path: Path, warm_python: WarmPython
) -> None:
    url = f"{s3_bucket}/l1"
    storage = open_storage(url)
    command = ["-m", "harvest", *arguments, "--out", url]
    with warm_python.start(command, tmp_path) as process:
        # The server is in this process, and each question keeps it from its work.
        process.until(lambda: [key for key in storage.keys("manifest") if key.endswith(".json")], every=0.05)
        process.send_signal(signal.SIGKILL)
    assert storage.read("manifest/.lock") is not None  # nobody gave it back
    again = warm_python.run(command, tmp_path)
    assert again.returncode == 0, again.stderr
    assert content(url).keys() == files(finished).keys()
    for key, value in content(url).items():
        # The root holds the versions and the commit of the source, which another process may see otherwise.
        assert key == "zarr.json" or value == files(finished)[key]


def test_trains_and_evaluates_through_the_server(
    cli: Cli, arguments: list[str], finished: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3_bucket}/sets/l1"
    assert cli(*arguments, "--out", url)[0] == 0

    def run(door: Callable[[], None], *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [door.__name__, *words])
        with pytest.raises(SystemExit) as end:
            door()
        assert end.value.code == 0

    reports = []
    for shards, run_folder in ((url, "data/runs/l1-k3"), (str(finished), "here")):
        recipe = ["--group-sizes", "8,16,24", "--k", "3", "--batch-tokens", "64", "--steps", "20", "--device", "cpu"]
        settings = ["--set", "train.buffer_tokens=512", "--set", "train.calibration_tokens=64"]
        out = [] if shards == url else ["--out", run_folder]
        run(launch.train, "run", "--shards", shards, *recipe, *settings, *out)
        run(launch.evaluate, "run", run_folder, "--shards", shards, "--device", "cpu")
        digest = ShardSet.open(shards).digest
        reports.append(json.loads(Path(run_folder, "eval", f"l1-{digest[:8]}", "report.json").read_text()))
    weights = [next(Path(name).rglob("transcoder.safetensors")).read_bytes() for name in ("data/runs/l1-k3", "here")]
    assert weights[0] == weights[1]
    assert reports[0]["shard_set"] == reports[1]["shard_set"]
    record = json.loads(Path("data/runs/l1-k3/run.json").read_text())
    assert record["config"]["shards"] == url
