"""The spliced model's losses against a plain Hugging Face model with plain hooks, context by context."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluate.analyses.faithfulness import faithfulness as module
from evaluate.analyses.faithfulness.faithfulness import FaithfulnessAnalysis
from evaluate.analyses.faithfulness.result import Faithfulness
from evaluate.analyses.faithfulness.table import faithfulness_table
from evaluate.analysis import Answer, Silent, answer
from evaluate.commands.terminal import Terminal
from evaluate.config import EvaluateConfig
from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel

MODELS = ("gemma2", "llama", "gpt2")
ENDS = (5, 14, 31)


def measure_faithfulness(run: Path, config: EvaluateConfig, *, error_term: bool = False) -> Answer[Faithfulness]:
    (found,) = answer(FaithfulnessAnalysis(error_term=error_term), [run], config)
    return found


def kept(
    special: torch.Tensor, read: list[torch.Tensor], make: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """An edit to make(u) that leaves special rows as they are and keeps u in `read`."""

    def edit(u: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        read.append(u)
        return torch.where(special, target, make(u))

    return edit


class Twin:
    """Everything in loops: one context, one position, one variant at a time, in float64."""

    def __init__(self, subject: Any, n_contexts: int, n_groups: int) -> None:
        self.n = 0
        self.ce: dict[str, float] = {}
        self.kl: dict[str, float] = {}
        self.top1: dict[str, float] = {}
        self.l0 = [0.0] * n_groups
        self.by_document: dict[int, list[tuple[float, float]]] = {}
        transcoder = subject.transcoder
        mean = subject.shards.stats("target").mean.float()
        for tokens, docs in subject.contexts()[:n_contexts]:
            special = torch.tensor([token in subject.special_ids for token in tokens])[:, None]
            read: list[torch.Tensor] = []
            variants = {
                "clean": None,
                "zero": kept(special, read, lambda u: torch.zeros_like(u)),
                "mean": kept(special, read, lambda u: mean.expand(u.shape)),
                **{str(g): kept(special, read, lambda u, g=g: transcoder(u, g)) for g in range(1, n_groups + 1)},
            }
            log_q = {name: subject.logits(tokens, edit).double().log_softmax(-1) for name, edit in variants.items()}
            acts = transcoder.encode(read[0])
            for p in range(len(tokens)):
                if not subject.is_scored(tokens, docs, p):
                    continue
                self.n += 1
                log_p = log_q["clean"][p]
                for g in range(n_groups):
                    self.l0[g] += float((acts[p, : ENDS[g]] > 0).sum())
                lost = float(log_p[tokens[p + 1]] - log_q["1"][p][tokens[p + 1]])
                self.by_document.setdefault(docs[p], []).append((1, lost))
                for name, log in log_q.items():
                    self.ce[name] = self.ce.get(name, 0) - float(log[p, tokens[p + 1]])
                    kl = float((log_p.exp() * (log_p - log[p])).sum())
                    self.kl[name] = self.kl.get(name, 0) + kl
                    self.top1[name] = self.top1.get(name, 0) + float(int(log_p.argmax()) == int(log[p].argmax()))

    def check(self, found: Faithfulness, n_groups: int) -> None:
        assert found.n_documents == len(self.by_document)
        clean, zero, mean = (self.ce[name] / self.n for name in ("clean", "zero", "mean"))
        assert found.n_tokens == self.n
        assert found.ce_loss_clean == pytest.approx(clean, rel=1e-4)
        assert found.ce_loss_ablated_zero == pytest.approx(zero, rel=1e-4)
        assert found.ce_loss_ablated_mean == pytest.approx(mean, rel=1e-4)
        assert found.kl_ablated_zero == pytest.approx(self.kl["zero"] / self.n, rel=1e-3)
        assert found.kl_ablated_mean == pytest.approx(self.kl["mean"] / self.n, rel=1e-3)
        assert len(found.prefixes) == n_groups
        for g, prefix in enumerate(found.prefixes, 1):
            ce = self.ce[str(g)] / self.n
            assert (prefix.prefix, prefix.prefix_end) == (g, ENDS[g - 1])
            assert prefix.l0 == pytest.approx(self.l0[g - 1] / self.n)
            assert prefix.ce_loss_spliced == pytest.approx(ce, rel=1e-4)
            assert prefix.ce_increase == pytest.approx(ce - clean, rel=1e-3, abs=1e-4)
            assert prefix.kl == pytest.approx(self.kl[str(g)] / self.n, rel=1e-3)
            assert prefix.top1_agreement == pytest.approx(self.top1[str(g)] / self.n)
            for got, ablated in ((prefix.ce_recovered_zero, zero), (prefix.ce_recovered_mean, mean)):
                if ablated > clean:
                    assert got == pytest.approx((ablated - ce) / (ablated - clean), rel=1e-2, abs=1e-3)
                else:
                    assert got is None


@pytest.mark.parametrize("kind", MODELS)
def test_against_plain_hooks(kind: str, subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject(kind)
    found = measure_faithfulness(one.run, one.config(tmp_path)).result
    assert found.n_contexts == 8
    Twin(one, 8, 3).check(found, 3)
    assert len({prefix.ce_loss_spliced for prefix in found.prefixes}) == 3
    assert found.kl_ablated_zero > 0.001
    assert 0 < found.prefixes[0].l0 < found.prefixes[2].l0 < 30


def test_intervals_draw_documents(subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject("llama")
    found = measure_faithfulness(one.run, one.config(tmp_path, bootstrap=90, seed=6)).result
    twin = Twin(one, 8, 3)
    documents = [torch.tensor(twin.by_document[document]).sum(0) for document in sorted(twin.by_document)]
    assert found.n_documents == len(documents) == 13
    generator, values = torch.Generator().manual_seed(6), []
    for _ in range(90):
        drawn = torch.randint(len(documents), (len(documents),), generator=generator).tolist()
        n, lost = torch.stack([documents[unit] for unit in drawn]).sum(0).tolist()
        values.append(lost / n)
    interval = found.prefixes[0].ce_increase_interval
    assert interval == pytest.approx(np.quantile(values, [0.025, 0.975]), rel=1e-3, abs=1e-4)
    assert "over 13 documents (few documents)" in faithfulness_table(found).caption


def test_tokens_are_whole_contexts_and_a_prefix_stands_alone(subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject("llama")
    config = one.config(tmp_path, prefix=2, faithfulness={"tokens": 20}, lm={"batch_tokens": 1})
    found = measure_faithfulness(one.run, config).result
    assert found.n_contexts == 2  # 11 ordinary tokens in the first, 12 in the second
    Twin(one, 2, 2).check(found, 2)


@pytest.mark.parametrize("kind", MODELS)
def test_with_the_error_term_nothing_changes(kind: str, subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject(kind)
    measured = measure_faithfulness(one.run, one.config(tmp_path), error_term=True)
    assert measured.path.name == "faithfulness-with-error.json"
    assert not (tmp_path / "faithfulness.json").exists()
    for prefix in measured.result.prefixes:
        assert abs(prefix.ce_increase) < 1e-5
        assert 0 <= prefix.kl + 1e-7 < 1e-6
        assert prefix.top1_agreement == 1


def test_it_lies_beside_the_report_and_is_made_once(
    subject: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = subject("gpt2")
    run = Path(shutil.copytree(one.run, tmp_path / "l1-k6"))
    config = one.config()
    monkeypatch.setenv("COLUMNS", "200")
    first = measure_faithfulness(run, config)
    assert first.path == run / "eval" / f"l1-{one.shards.digest[:8]}" / "faithfulness.json"
    assert sorted(path.name for path in first.path.parent.iterdir()) == ["faithfulness.json"]
    before = first.path.read_bytes()
    assert b"/tmp" not in before
    content = json.loads(before)
    wanted = {"ce_loss_clean", "ce_loss_ablated_zero", "ce_loss_ablated_mean", "n_tokens", "prefixes"}
    assert wanted <= content.keys()
    Terminal().say(FaithfulnessAnalysis(), [first])
    shown = capsys.readouterr()
    assert "rec. zero" in shown.out
    assert "written" in shown.err
    assert len(faithfulness_table(first.result).rows) == 6

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_model", lambda *_: pytest.fail("the model was loaded for nothing"))
        again = measure_faithfulness(run, config)
        assert not again.is_new
        assert again.result == first.result
        Terminal().say(FaithfulnessAnalysis(), [again])
        assert "nothing left to do" in capsys.readouterr().err
    other = measure_faithfulness(run, one.config(seed=4))
    assert other.replaced == ("settings.seed: 0 -> 4",)
    Terminal().say(FaithfulnessAnalysis(), [other])
    assert "replaced an older result (settings.seed: 0 -> 4)" in capsys.readouterr().err
    first.path.unlink()
    assert measure_faithfulness(run, config).path.read_bytes() == before


class Killed(Exception):
    """Stands for a kill between two batches."""


def test_a_killed_pass_goes_on_and_gives_the_same_bytes(
    subject: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject("llama")
    settings: dict[str, Any] = {"lm": {"batch_tokens": 2 * 13}, "save_minutes": 0}
    whole = measure_faithfulness(one.run, one.config(tmp_path / "whole", **settings))
    seen: list[tuple[int, ...]] = []
    forward = module._Splicing.sums_of
    # It runs a context of its own, which is no part of the pass.
    monkeypatch.setattr(module._Splicing, "estimate", lambda *_: "")

    def dying(self: Any, contexts: Any) -> torch.Tensor:
        if len(seen) == 2:
            raise Killed
        seen.append(contexts.numbers)
        return forward(self, contexts)

    with monkeypatch.context() as patch:
        patch.setattr(module._Splicing, "sums_of", dying)
        with pytest.raises(Killed):
            measure_faithfulness(one.run, one.config(tmp_path / "killed", **settings))
    assert seen == [(0, 1), (2,)]
    assert not (tmp_path / "killed" / "faithfulness.json").exists()

    def counting(self: Any, contexts: Any) -> torch.Tensor:
        seen.append(contexts.numbers)
        return forward(self, contexts)

    monkeypatch.setattr(module._Splicing, "sums_of", counting)
    resumed = measure_faithfulness(one.run, one.config(tmp_path / "killed", **settings))
    assert seen == [(0, 1), (2,), (3, 4), (5,), (6, 7)]
    assert resumed.n_resumed == 11 + 12 + 12
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["faithfulness.json"]


def test_the_batch_size_changes_no_number(subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject("gemma2")
    found = [
        measure_faithfulness(one.run, one.config(tmp_path / str(n), lm={"batch_tokens": n})).result
        for n in (1, 40, 4096)
    ]
    for other in found[1:]:
        assert other.ce_loss_clean == pytest.approx(found[0].ce_loss_clean, rel=1e-5)
        assert other.prefixes[1].kl == pytest.approx(found[0].prefixes[1].kl, rel=1e-3)


@pytest.mark.parametrize("n_before", [0, 23])
def test_an_estimate_comes_before_the_bar(
    subject: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_before: int
) -> None:
    one = subject("llama")
    config = one.config(tmp_path, lm={"batch_tokens": 2 * 13}, save_minutes=0)
    seen: list[str] = []

    class Told(Silent):
        def noted(self, text: str) -> None:
            seen.append(text)

        def started(self, name: str, n_rows: int) -> None:
            seen.append(f"{name} {n_rows}")

        def advanced(self, n_rows: int) -> None:
            if len(seen) == 2 and n_rows > 0 and n_before:
                raise Killed

    if n_before:
        # Two contexts are done and saved when it dies.
        with pytest.raises(Killed):
            answer(FaithfulnessAnalysis(), [one.run], config, Told())
        seen.clear()
    # Each look at the clock is two seconds after the one before.
    ticks = iter(range(0, 10**6, 2))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(Told, "advanced", Silent.advanced)
    (found,) = answer(FaithfulnessAnalysis(), [one.run], config, Told())
    tokens = [context for context, _ in one.contexts()]
    rows = [sum(token not in one.special_ids for token in context) for context in tokens]
    rate = rows[2 if n_before else 0] / 2
    assert found.n_resumed == n_before
    assert sum(rows[:2]) == 23
    left = sum(rows) - n_before
    assert seen[1] == f"l1-k6 {sum(rows)}"
    expected = f"l1-k6: about 0:00:{round(left / rate):02} for {left} rows on cpu, {rate:.1f} rows/s with one context"
    assert seen[0].startswith(expected)


def test_train_rows_only_when_asked_for(subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject("gpt2")
    run = Path(shutil.copytree(one.run, tmp_path / "l1-k6"))
    measured = measure_faithfulness(run, one.config(split="train"))
    assert measured.path.parent.name == "train"
    assert measured.result.shard_set.split == "train"
    assert measured.result.n_contexts == 4


# --- the language model ----------------------------------------------------------------------------------------


def test_a_model_that_has_moved_is_named(subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject("gpt2")
    moved = Path(shutil.copytree(one.folder, tmp_path / "elsewhere"))
    found = measure_faithfulness(one.run, one.config(tmp_path / "a", lm={"model": str(moved)})).result
    assert found == measure_faithfulness(one.run, one.config(tmp_path / "b")).result


def test_another_model_is_refused(subject: Callable[[str], Any], tmp_path: Path, tiny_llama: Path) -> None:
    one = subject("gemma2")
    with pytest.raises(UserError, match=r"does not give the activations that .* holds: at blocks\.1\.hook_resid_mid"):
        measure_faithfulness(one.run, one.config(tmp_path, lm={"model": str(tiny_llama)}))
    assert not (tmp_path / "faithfulness.json").exists()
    gpt2 = str(subject("gpt2").folder)
    with pytest.raises(UserError, match="has 20 dimensions .* it is another model"):
        measure_faithfulness(one.run, one.config(tmp_path, lm={"model": gpt2}))
    with pytest.raises(UserError, match="name it with --model"):
        measure_faithfulness(one.run, one.config(tmp_path, lm={"model": str(tmp_path / "nothing")}))


def test_other_mistakes(subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject("llama")
    with pytest.raises(UserError, match="no shard set was named"):
        measure_faithfulness(one.run, one.config(tmp_path).model_copy(update={"shards": None}))
    with pytest.raises(UserError, match="3 nested groups"):
        measure_faithfulness(one.run, one.config(tmp_path, prefix=4))


def test_a_full_memory_says_what_to_do(
    subject: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject("llama")

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LanguageModel, "logits", full)
    with pytest.raises(UserError, match=r"does not hold 13 tokens .* evaluate\.lm\.batch_tokens"):
        measure_faithfulness(one.run, one.config(tmp_path))
