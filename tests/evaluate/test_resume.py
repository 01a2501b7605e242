"""A pass that is stopped at any batch goes on to the same bytes: by an exception, and by a real kill -9."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from warm_processes import WarmPython

from evaluate.analyses.hierarchy.hierarchy import HierarchyAnalysis
from evaluate.analyses.reconstruction.run import RunAnalysis
from evaluate.analyses.samples.samples import SamplesAnalysis
from evaluate.analysis import Silent, answer
from evaluate.config import EvaluateConfig, HierarchyConfig, SamplesConfig
from evaluate.resume import load_state, resumable_pass, state_of
from evaluate.rows import context_blocks as blocks_module
from matryoshka.errors import UserError
from matryoshka.metrics import FvuSums
from matryoshka.shards import ShardSet


class Stopped(Exception):
    """Stands for whatever ends a process."""


class StopsAfter(Silent):
    """Raises at the n-th report of progress; the first one says how many rows were done before."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.first: int | None = None

    def advanced(self, n_rows: int) -> None:
        self.first = n_rows if self.first is None else self.first
        self.left -= 1
        if self.left < 0:
            raise Stopped


def settings(shards: ShardSet, **changes: Any) -> EvaluateConfig:
    content = {
        "batch_rows": 11,
        "curve_tokens": 40,
        "bootstrap": 20,
        "save_minutes": 0.0,
        "hierarchy": HierarchyConfig(clusters=False, min_rows=2),
        "samples": SamplesConfig(top=4, per_decile=1, random=2, before=3, after=2),
        **changes,
    }
    return EvaluateConfig(shards=shards.path, device="cpu", **content)


def make_report(run: Path, config: EvaluateConfig, progress: Silent) -> int:
    (evaluation,) = answer(RunAnalysis(), [run], config, progress)
    return evaluation.n_resumed


def make(kind: str, run: Path, config: EvaluateConfig, progress: Silent) -> int:
    """Rows that were not measured again."""
    if kind == "run":
        return make_report(run, config, progress)
    analysis = SamplesAnalysis() if kind == "samples" else HierarchyAnalysis()
    return answer(analysis, [run], config, progress)[0].n_resumed


def files(run: Path) -> dict[str, bytes]:
    folder = run / "eval"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["run", "hierarchy", "samples"])
def test_stopped_after_any_batch(
    val_set: ShardSet, made: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_ROWS", 16)
    transcoder = made.transcoder()
    whole = made.run(tmp_path / "whole" / "run", transcoder)
    counter = StopsAfter(10**6)
    assert make(kind, whole, settings(val_set), counter) == 0
    expected, n_reports = files(whole), 10**6 - counter.left
    assert n_reports > 6
    for n in range(2, n_reports):
        run = made.run(tmp_path / str(n) / "run", transcoder)
        with pytest.raises(Stopped):
            make(kind, run, settings(val_set), StopsAfter(n))
        again = StopsAfter(10**6)
        assert make(kind, run, settings(val_set), again) == again.first
        # The batch during whose report it stopped was not saved yet.
        assert (again.first or 0) > 0
        assert files(run) == expected


def test_stopped_again_and_again(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    answer(RunAnalysis(), [run], settings(val_set))
    expected = files(run)
    for path in (run / "eval").rglob("*.json"):
        path.unlink()
    done = []
    for _ in range(100):
        stops = StopsAfter(2)
        try:
            make("run", run, settings(val_set), stops)
        except Stopped:
            done.append(stops.first)
            continue
        break
    assert done == [11 * i for i in range(len(done))]
    assert len(done) > 4
    assert files(run) == expected


def test_other_settings_start_anew(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    with pytest.raises(Stopped):
        make("run", run, settings(val_set), StopsAfter(4))
    assert (run / "eval" / f"l1-{val_set.digest[:8]}" / "report.partial" / "pass.npz").is_file()
    assert make("run", run, settings(val_set, seed=3), Silent()) == 0
    other = made.run(tmp_path / "other" / "run", made.transcoder())
    make("run", other, settings(val_set, seed=3), Silent())
    assert files(run) == files(other)


def test_a_torn_state_is_no_state(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    with pytest.raises(Stopped):
        make("run", run, settings(val_set), StopsAfter(4))
    (state,) = (run / "eval").rglob("pass.npz")
    state.write_bytes(state.read_bytes()[:-50])
    assert make("run", run, settings(val_set), Silent()) == 0


def test_a_lost_part_of_a_hierarchy_is_said(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    with pytest.raises(Stopped):
        make("hierarchy", run, settings(val_set), StopsAfter(5))
    next((run / "eval").rglob("fires-000001.npz")).unlink()
    with pytest.raises(UserError, match=r"fires-000001\.npz.*delete the folder .*hierarchy\.partial"):
        make("hierarchy", run, settings(val_set), Silent())


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        resumable_pass(tmp_path / "report.json", {}, 1.0),
        pytest.raises(UserError, match="being written by another process"),
        resumable_pass(tmp_path / "report.json", {}, 1.0),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@dataclass
class Sums:
    """One of everything."""

    scales: tuple[float, ...]
    n: int = 0
    total: float = 0.0
    smallest: float | None = None
    fvu: list[FvuSums] = field(default_factory=lambda: [FvuSums(), FvuSums()])
    grown: torch.Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.int64))
    hit: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.bool))


def test_every_kind_of_sum_comes_back() -> None:
    sums = Sums((1.0,), 3, 0.1 + 0.2, 0.7)
    sums.fvu[1].add(torch.randn(5, 4), torch.rand(2, 5))
    sums.grown, sums.hit[1] = torch.arange(6).view(2, 3), True
    state = state_of(sums)
    assert set(state) >= {"n", "total", "smallest", "fvu.0.n_rows", "fvu.1.sq_err", "grown", "hit"}
    other = Sums((1.0,))
    assert state_of(other)["smallest"].shape == (0,)
    load_state(other, state)
    assert (other.n, other.total, other.smallest) == (3, 0.1 + 0.2, 0.7)
    assert (type(other.n), type(other.total)) == (int, float)
    assert other.fvu[1].value() == sums.fvu[1].value()
    assert other.fvu[0].n_rows == 0
    assert torch.equal(other.grown, sums.grown)
    assert torch.equal(other.hit, sums.hit)
    assert other.hit.dtype == torch.bool
    load_state(other, state_of(Sums((1.0,))))
    assert other.smallest is None
    # The arrays are the tensors' own memory: whoever goes on adding must not change a loaded state.
    before = np.copy(state["hit"])
    load_state(other, state)
    other.hit[0] = True
    assert (state["hit"] == before).all()


DRIVER = """
import json, os, signal, sys
from pathlib import Path
from evaluate.analysis import Silent, answer
from evaluate.config import EvaluateConfig
from evaluate.analyses.reconstruction.run import RunAnalysis
from evaluate.analyses.hierarchy.hierarchy import HierarchyAnalysis

class Killer(Silent):
    left = int(sys.argv[4])
    def advanced(self, n_rows):
        Killer.left -= 1
        if Killer.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

config = EvaluateConfig.model_validate_json(sys.argv[3]).model_copy(update={"shards": Path(sys.argv[5])})
if sys.argv[1] == "run":
    answer(RunAnalysis(), [Path(sys.argv[2])], config, Killer())
else:
    answer(HierarchyAnalysis(), [Path(sys.argv[2])], config, Killer())
"""


@pytest.mark.kill
@pytest.mark.parametrize("kind", ["run", "hierarchy"])
def test_kill_9(val_set: ShardSet, made: Any, tmp_path: Path, kind: str, warm_python: WarmPython) -> None:
    def start(run: Path, kill_at: int) -> int:
        words = [run, settings(val_set).model_dump_json(exclude={"shards"}), str(kill_at), val_set.path]
        return warm_python.run(["-c", DRIVER, kind, *words], tmp_path).returncode

    # All in processes of their own: another number of threads in this one would mean other last bits.
    whole = made.run(tmp_path / "whole" / "run", made.transcoder())
    assert start(whole, 0) == 0
    run = made.run(tmp_path / "run", made.transcoder())
    assert start(run, 5) == -signal.SIGKILL
    assert not list((run / "eval").rglob("*.json"))
    (state,) = (run / "eval").rglob("pass.npz")
    with np.load(state, allow_pickle=False) as arrays:
        assert int(arrays["n_rows"]) == 3 * 11
    assert start(run, 0) == 0
    assert files(run) == files(whole)


def test_what_comes_back_lies_in_aligned_memory() -> None:
    """A dot product of float64 sums may differ in its last bit with the alignment of its operands."""
    sums = Sums((1.0,), grown=torch.zeros(3, 700, dtype=torch.int64))
    odd = np.zeros(3 * 700 * 8 + 8, dtype=np.uint8)[8:].view(np.int64).reshape(3, 700)
    for _ in range(20):
        load_state(sums, {**state_of(sums), "grown": odd})
        assert sums.grown.data_ptr() % 64 == 0
