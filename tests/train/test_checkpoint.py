"""Checkpoints are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from matryoshka.checkpoints import list_checkpoints
from matryoshka.errors import UserError
from matryoshka.transcoder import Transcoder, TranscoderConfig
from train import checkpoint as module
from train.checkpoint import prune_checkpoints, save_checkpoint, saved_state

TENSORS = {"W_enc": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(7), "threshold": torch.tensor(0.5)}


def make_transcoder() -> Transcoder:
    return Transcoder(TranscoderConfig(d_in=3, d_out=4, group_sizes=(1, 1), k=1))


def test_write_then_read_is_equal(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 7, TENSORS, make_transcoder(), finished=False)
    (found,) = list_checkpoints(tmp_path)
    assert (found.step, found.is_finished, found.folder.name) == (7, False, "step-000007")
    loaded = saved_state(found.folder)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert Transcoder.load(found.folder).config.group_sizes == (1, 1)


def test_killed_half_way_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 5, TENSORS, make_transcoder(), finished=False)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "publish_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 10, TENSORS, make_transcoder(), finished=False)
    assert [c.step for c in list_checkpoints(tmp_path)] == [5]
    monkeypatch.undo()
    save_checkpoint(tmp_path, 10, TENSORS, make_transcoder(), finished=True)
    save_checkpoint(tmp_path, 10, TENSORS, make_transcoder(), finished=True)
    prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000010"]


def test_a_torn_state_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, TENSORS, make_transcoder(), finished=False)
    (found,) = list_checkpoints(tmp_path)
    (found.folder / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="delete that folder"):
        saved_state(found.folder)


def test_the_newest_and_every_mth_stay(tmp_path: Path) -> None:
    for step in range(5, 45, 5):
        save_checkpoint(tmp_path, step, TENSORS, make_transcoder(), finished=False)
        prune_checkpoints(tmp_path, keep=2, keep_every=15)
    assert [c.step for c in list_checkpoints(tmp_path)] == [15, 30, 35, 40]
