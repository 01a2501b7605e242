"""A shard set in other processes and on other systems' disks: pickled, copied with what file managers leave."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from matryoshka.shards import ShardSet
from matryoshka.shards.verify import verify


class Shards(Dataset[torch.Tensor]):
    """The source of one shard of train an item."""

    def __init__(self, shards: ShardSet) -> None:
        self.split = shards.train

    def __len__(self) -> int:
        return self.split.n_shards

    def __getitem__(self, shard: int) -> torch.Tensor:
        return self.split.activations("source", shard)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_of_a_data_loader_read_a_set(toy_path: Path, method: str) -> None:
    shards = ShardSet.open(toy_path)
    shards.train.activations("source", 0)  # with a file open and factors cached
    loader = DataLoader(Shards(shards), batch_size=None, num_workers=2, multiprocessing_context=method)
    found = list(loader)
    assert len(found) == shards.train.n_shards > 1
    for shard, source in enumerate(found):
        assert torch.equal(source, shards.train.activations("source", shard))


def test_pickled(toy_path: Path) -> None:
    shards = ShardSet.open(toy_path)
    again = pickle.loads(pickle.dumps((shards, shards.val, next(shards.val.blocks()))))
    assert again[0].digest == shards.digest
    assert again[1].name == "val"
    assert torch.equal(again[2].source, next(shards.val.blocks()).source)


def test_repr_says_what_is_in_it(toy_path: Path) -> None:
    shards = ShardSet.open(toy_path)
    n_rows = sum(int(shards.train.keep(shard).sum()) for shard in range(shards.train.n_shards))
    assert f"<train: {n_rows:,} rows in {shards.train.n_contexts} contexts" in repr(shards)
    assert f"held-out {shards.val_unit}s" in repr(shards)


def test_what_other_systems_leave_is_nobodys(toy_path: Path, tmp_path: Path) -> None:
    """open, train and verify agree: none of it belongs to the set."""
    copy = Path(shutil.copytree(toy_path, tmp_path / "copy"))
    for folder in [copy, *(path for path in copy.rglob("*") if path.is_dir())]:
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._zarr.json", "._train-00000.json"):
            (folder / name).write_bytes(b"\0\5\x16\7")
    assert ShardSet.open(copy, verify=True).digest == ShardSet.open(toy_path).digest
    assert verify(copy) == verify(toy_path)
