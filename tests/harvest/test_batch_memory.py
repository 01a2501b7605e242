"""A batch size that was found by running out of memory is not found again by the same command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harvest.batch_memory import KEY, forget, remember, remembered
from matryoshka.lm import LanguageModel
from matryoshka.shards import ShardSetWriter
from matryoshka.shards.place import Folder

Harvest = Callable[..., tuple[int, str]]
CPU = torch.device("cpu")


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_it_answers_the_same_question_only(tmp_path: Path) -> None:
    place = Folder(tmp_path)
    (tmp_path / "manifest").mkdir()
    assert remembered(place, 8, CPU) is None
    remember(place, 8, CPU, 2)
    assert remembered(place, 8, CPU) == 2
    assert remembered(place, 16, CPU) is None  # another setting
    assert remembered(place, "auto", CPU) is None
    assert remembered(place, 8, torch.device("meta")) is None  # another device
    forget(place)
    assert remembered(place, 8, CPU) is None
    for odd in (b"no json", b"[2]", b"3"):
        place.publish(KEY, odd)
        assert remembered(place, 8, CPU) is None


def test_a_continued_harvest_starts_with_it_and_leaves_no_trace(
    harvest: Harvest, finished: Path, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = LanguageModel.capture

    def capture(self: LanguageModel, tokens: Tensor, hook_points: Sequence[str]) -> dict[str, Tensor]:
        asked.append(len(tokens))
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens, hook_points)

    monkeypatch.setattr(LanguageModel, "capture", capture)
    with monkeypatch.context() as patch:
        patch.setattr(
            ShardSetWriter, "finish", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        assert harvest()[0] != 0
    assert asked[0] == 3
    assert remembered(Folder(tmp_path / "out"), 3, lm.device) == 1
    (tmp_path / "out/manifest/train-00004.json").unlink()
    asked.clear()
    code, said = harvest()
    assert code == 0, said
    assert set(asked) == {1}
    assert files(tmp_path / "out").keys() == files(finished).keys()
