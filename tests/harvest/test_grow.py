"""More tokens into a set that is there: old shards stay, new ones follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.shards import ShardSet, ShardSetWriter, layout
from matryoshka.shards.verify import verify

Harvest = Callable[..., tuple[int, str]]


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def shard_files(path: Path) -> dict[Path, tuple[int, bytes]]:
    """Files of shards and their records, with the time of their last change; not the statistics of the set."""
    shards = ShardSet.open(path)
    keys = [key for record in shards.records for key in record.files]
    keys += [f"manifest/{record.name}" for record in shards.records]
    return {path / key: ((path / key).stat().st_mtime_ns, (path / key).read_bytes()) for key in keys}


def rows(shards: ShardSet, split: str, side: str) -> torch.Tensor:
    part = shards.split(split)
    return torch.cat([part.activations(side, shard).transpose(0, 1) for shard in range(part.n_shards)])


@pytest.mark.parametrize("first", ["2k", "2200"])
def test_a_grown_set_holds_what_a_new_one_would(first: str, harvest: Harvest, tmp_path: Path) -> None:
    """Contexts in the same order with the same activations; only how they are cut into shards differs.

    2200 tokens end in a shard with fewer contexts than there is room for, which stays as it is.
    """
    out = tmp_path / "out"
    assert harvest("--tokens", first)[0] == 0
    old, plan = shard_files(out), ShardSet.open(out).manifest.splits
    code, said = harvest("--tokens", "6k")
    assert code == 0, said
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in old} == old
    grown = ShardSet.open(out, verify=True)
    assert harvest("--tokens", "6k", out=tmp_path / "new")[0] == 0
    new = ShardSet.open(tmp_path / "new")
    for split in ("train", "val"):
        part = grown.split(split)
        assert part.shard_contexts[: plan[split].n_shards] == plan[split].shard_contexts
        assert part.n_contexts == new.split(split).n_contexts
        for name in ("tokens", "doc_ids"):
            ids = [
                torch.cat([getattr(s.split(split), name)(i) for i in range(s.split(split).n_shards)])
                for s in (grown, new)
            ]
            assert torch.equal(*ids)
        for side in ("source", "target"):
            # batches are cut at the ends of shards, so a context may have had other neighbours
            torch.testing.assert_close(rows(grown, split, side), rows(new, split, side), rtol=0.02, atol=0.02)
    for site in ("source", "target", "normalized"):
        torch.testing.assert_close(grown.stats(site).mean, new.stats(site).mean, rtol=1e-3, atol=1e-3)
    assert grown.norm_quantiles("source") == pytest.approx(new.norm_quantiles("source"), rel=0.01)
    assert grown.manifest.settings["tokens"] == 6000
    assert "nothing left to do (6,000 tokens" in harvest("--tokens", "6k")[1]


def test_fewer_tokens_are_refused(harvest: Harvest, tmp_path: Path) -> None:
    assert harvest("--tokens", "3k")[0] == 0
    before = files(tmp_path / "out")
    code, said = harvest("--tokens", "2k")
    assert code == 2
    assert "was harvested with other settings (tokens: 3000 -> 2000)" in said
    code, said = harvest("--tokens", "4k", "--seed", "1")
    assert code == 2
    assert "other settings (seed: 0 -> 1)" in said
    assert files(tmp_path / "out") == before


def test_an_unfinished_set_can_grow_too(harvest: Harvest, tmp_path: Path) -> None:
    assert harvest("--tokens", "2k")[0] == 0
    (tmp_path / "out" / "manifest" / "train-00002.json").unlink()
    assert harvest("--tokens", "5k")[0] == 0
    assert harvest("--tokens", "2k", out=tmp_path / "other")[0] == 0
    assert harvest("--tokens", "5k", out=tmp_path / "other")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "other")


def test_text_that_ended_early_does_not_grow(harvest: Harvest, tmp_path: Path) -> None:
    assert harvest("--tokens", "40k")[0] == 0
    old = shard_files(tmp_path / "out")
    code, said = harvest("--tokens", "60k")
    assert code == 0, said
    assert "the text ended early" in said
    assert shard_files(tmp_path / "out") == old
    assert "nothing left to do" in harvest("--tokens", "60k")[1]


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("name", "after"), [("publish", 0), ("fit_arrays", 0), ("publish", 1)])
def test_growth_that_is_cut_short_goes_on(
    name: str, after: int, late: bool, harvest: Harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in ("out", "other"):
        assert harvest("--tokens", "2k", out=tmp_path / out)[0] == 0
    assert harvest("--tokens", "4k", out=tmp_path / "other")[0] == 0
    real, left = getattr(layout, name), after

    def bomb(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            return real(*args, **kwargs)
        if late:
            real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(layout, name, bomb)
        with pytest.raises(Killed):
            harvest("--tokens", "4k")
    if (name, after, late) not in (("publish", 0, False), ("publish", 1, True)):
        with pytest.raises(UserError, match="unfinished"):
            ShardSet.open(tmp_path / "out")
    assert harvest("--tokens", "4k")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "other")


def test_a_set_that_has_not_grown_up_is_verified_as_far_as_it_is(
    harvest: Harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert harvest("--tokens", "2k")[0] == 0
    n_before = len(list(out.glob("manifest/*.json")))

    def stop(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ShardSetWriter, "finish", stop)
        with pytest.raises(Killed):
            harvest("--tokens", "4k")
    verdict = verify(out)
    assert verdict.is_whole
    assert not verdict.complete
    assert verdict.n_committed == verdict.n_planned > n_before
    assert harvest("--tokens", "4k")[0] == 0
    assert verify(out).complete
