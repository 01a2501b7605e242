"""Single latents out of the model, against a plain Hugging Face model with plain hooks; and where latents fire."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluate.analyses.ablate import ablate as module
from evaluate.analyses.ablate.ablate import AblateAnalysis
from evaluate.analyses.ablate.result import Ablation
from evaluate.analysis import Answer, Silent, answer
from evaluate.commands.terminal import Terminal
from evaluate.config import EvaluateConfig
from evaluate.measures.firing import Firing, add_firing, find_firing
from evaluate.report.ablation import ablation_facts
from matryoshka.errors import UserError
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet

MODELS = ("gemma2", "llama", "gpt2")
LATENTS = (0, 7, 20)
NEVER = 30


class Stopped(Exception):
    """Ends a command as a kill would."""


class Stopping(Silent):
    """Raises at the n-th report of progress."""

    def __init__(self, n: int) -> None:
        self.n_left, self.n_reports = n, 0

    def advanced(self, n_rows: int) -> None:  # noqa: ARG002
        self.n_reports += 1
        if self.n_reports > self.n_left:
            raise Stopped


def ablate(run: Path, latents: list[int], config: EvaluateConfig, *, scale: float = 0.0) -> list[Answer[Ablation]]:
    return answer(AblateAnalysis(latents, scale), [run], config)


def twin(subject: Any, latent: int, scale: float) -> dict[str, Any]:
    """All val contexts in which the latent fires, position by position, in float64."""
    transcoder = subject.transcoder
    sums = dict.fromkeys(("n", "act", "loss", "kl", "top1", "later", "later_loss", "later_kl"), 0.0)
    documents: dict[int, list[float]] = {}
    contexts, ratio = 0, torch.zeros(len(subject.model.tokenizer), dtype=torch.float64)
    for tokens, docs in subject.contexts():
        special = torch.tensor([token in subject.special_ids for token in tokens])
        seen: list[torch.Tensor] = []

        def edit(
            u: torch.Tensor, target: torch.Tensor, special: torch.Tensor = special, seen: list[torch.Tensor] = seen
        ) -> torch.Tensor:
            acts = transcoder.encode(u)
            acts[special] = 0
            seen.append(acts[:, latent].clone())
            without = acts.clone()
            without[:, latent] *= scale
            return target + transcoder.decode(without) - transcoder.decode(acts)  # the error term stays

        log_q = subject.logits(tokens, edit).double().log_softmax(-1)
        log_p = subject.logits(tokens).double().log_softmax(-1)
        act = seen[0]
        if not bool((act > 0).any()):
            continue
        contexts += 1
        fired = False
        for p in range(len(tokens)):
            fires = float(act[p]) > 0
            if subject.is_scored(tokens, docs, p) and (fires or fired):
                loss = float(log_p[p, tokens[p + 1]] - log_q[p, tokens[p + 1]])
                kl = float((log_p[p].exp() * (log_p[p] - log_q[p])).sum())
                if fires:
                    sums["n"] += 1
                    sums["act"] += float(act[p])
                    sums["loss"] += loss
                    documents.setdefault(docs[p], []).append(loss)
                    sums["kl"] += kl
                    sums["top1"] += float(int(log_p[p].argmax()) != int(log_q[p].argmax()))
                    ratio += (log_q[p] - log_p[p])[: len(ratio)]
                else:
                    sums["later"] += 1
                    sums["later_loss"] += loss
                    sums["later_kl"] += kl
            fired = fired or fires
    return {**sums, "contexts": contexts, "ratio": ratio, "documents": documents}


@pytest.mark.parametrize("scale", [0.0, 3.0])
@pytest.mark.parametrize("kind", MODELS)
def test_against_plain_hooks(kind: str, scale: float, subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject(kind)
    config = one.config(tmp_path, ablate={"top": 3}, lm={"batch_tokens": 30})
    for latent, made in zip(LATENTS, ablate(one.run, list(LATENTS), config, scale=scale), strict=True):
        found, expected = made.result, twin(one, latent, scale)
        n = expected["n"]
        assert n > 0
        assert made.path == tmp_path / "ablations" / f"{latent}.json"
        assert (found.latent, found.scale) == (latent, scale)
        assert (found.n_contexts, found.n_contexts_firing) == (expected["contexts"],) * 2
        assert (found.n_positions, found.n_later) == (n, expected["later"])
        assert found.mean_act == pytest.approx(expected["act"] / n, rel=1e-4)
        assert found.loss_change == pytest.approx(expected["loss"] / n, rel=1e-3, abs=1e-5)
        assert found.kl == pytest.approx(expected["kl"] / n, rel=1e-3, abs=1e-6)
        assert found.top1_changed == pytest.approx(expected["top1"] / n)
        later = expected["later"] or None  # a latent that fires everywhere leaves no later position
        assert found.loss_change_later == (later and pytest.approx(expected["later_loss"] / later, rel=1e-3, abs=1e-5))
        assert found.kl_later == (later and pytest.approx(expected["later_kl"] / later, rel=1e-3, abs=1e-6))
        assert found.loss_change_interval is not None
        effects = (expected["ratio"] / n).tolist()
        order = sorted(range(len(effects)), key=effects.__getitem__)
        for side, best in ((found.raised, order[::-1]), (found.lowered, order)):
            assert [change.token for change in side] == best[:3]
            assert [change.effect for change in side] == pytest.approx(
                [effects[t] for t in best[:3]], rel=1e-2, abs=1e-4
            )


@pytest.mark.parametrize(("kind", "latent"), [("llama", 7), ("gemma2", 20)])
def test_the_interval_draws_documents(kind: str, latent: int, subject: Callable[[str], Any], tmp_path: Path) -> None:
    """Ninety draws, document by document and position by position."""
    one = subject(kind)
    found = ablate(one.run, [latent], one.config(tmp_path, bootstrap=90, seed=6))[0].result
    losses = twin(one, latent, 0.0)["documents"]
    names, means, generator = sorted(losses), [], torch.Generator().manual_seed(6)
    assert found.n_documents == len(names) > 4
    assert len({len(positions) for positions in losses.values()}) > 1
    for _ in range(90):
        drawn: list[float] = []
        for number in torch.randint(len(names), (len(names),), generator=generator).tolist():
            drawn += losses[names[number]]
        means.append(sum(drawn) / len(drawn))
    assert found.loss_change_interval == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-3, abs=1e-5)
    # A context may hold parts of several documents, and a document of several contexts: drawing contexts differs.
    assert found.n_documents != found.n_contexts


def test_the_pass_that_finds_where_they_fire_goes_on_after_a_kill(
    subject: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No chunk of the shard set is encoded twice, whenever the command ends, also between two latents."""
    one, chunks = subject("gemma2"), []

    def counted(found: Firing, *arguments: Any) -> Iterator[int]:
        for n_rows in add_firing(found, *arguments):
            chunks.append(found.n_chunks)
            yield n_rows

    monkeypatch.setattr(module, "add_firing", counted)
    n_shards = one.shards.val.n_shards
    assert n_shards == 3

    def command(out: Path, latents: list[int], stop: int | None) -> None:
        config = one.config(out, save_minutes=0.0, lm={"batch_tokens": 2 * 13})
        if stop is None:
            answer(AblateAnalysis(latents), [one.run], config)
            return
        with pytest.raises(Stopped):
            answer(AblateAnalysis(latents), [one.run], config, Stopping(stop))

    whole = Stopping(10**6)
    answer(AblateAnalysis([7, 0]), [one.run], one.config(tmp_path / "whole", lm={"batch_tokens": 2 * 13}), whole)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "ablations").iterdir()}
    for stop in range(1, whole.n_reports):
        chunks.clear()
        command(tmp_path / str(stop), [7, 0], stop)
        command(tmp_path / str(stop), [7, 0], None)
        assert chunks == list(range(1, n_shards + 1))
        found = {path.name: path.read_bytes() for path in (tmp_path / str(stop) / "ablations").iterdir()}
        assert found == expected
    # Asked for beside another one, it is known which contexts the first one had, and not where the other one fires.
    chunks.clear()
    command(tmp_path / "other", [7, 0], whole.n_reports - 2)
    command(tmp_path / "other", [0, 20], None)
    assert chunks == [1, 2, 3, 1, 2, 3]
    alone = ablate(one.run, [0], one.config(tmp_path / "alone"))[0].result
    assert alone.kl == pytest.approx(Ablation.read(tmp_path / "other", "ablations/0.json").kl)  # type: ignore[union-attr]


def test_a_factor_of_one_changes_nothing(subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject("llama")
    (made,) = ablate(one.run, [7], one.config(tmp_path), scale=1.0)
    assert made.result.kl == pytest.approx(0, abs=1e-9)
    assert made.result.loss_change == pytest.approx(0, abs=1e-7)
    assert made.result.top1_changed == 0


def test_a_latent_that_never_fires(
    subject: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = subject("gemma2")
    made = ablate(one.run, [NEVER], one.config(tmp_path))
    assert made[0].result.n_contexts_firing == made[0].result.n_positions == 0
    assert made[0].result.kl is None
    assert made[0].result.raised == ()
    Terminal().say(AblateAnalysis([0]), made)
    assert f"latent {NEVER} fires in none of the contexts" in capsys.readouterr().err


def test_contexts_are_drawn_among_those_where_it_fires(subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject("gpt2")
    split = one.shards.val
    counts = find_firing(one.transcoder, one.shards, split, [7], split.n_contexts).counts[0]
    assert int((counts > 0).sum()) > 3
    few = [
        ablate(one.run, [7], one.config(tmp_path / str(seed), seed=seed, ablate={"contexts": 2}))[0].result
        for seed in (0, 0, 1, 2, 3)
    ]
    assert {found.n_contexts for found in few} == {2}
    assert few[0] == few[1]
    assert len({found.kl for found in few}) > 1
    some = ablate(one.run, [7], one.config(tmp_path, tokens=30))[0].result  # the first three contexts
    assert some.n_contexts_firing == int((counts[:3] > 0).sum())


def test_it_is_made_once(
    subject: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = subject("llama")
    config = one.config(tmp_path)
    first = ablate(one.run, [0, 7, 0], config)
    assert [made.result.latent for made in first] == [0, 7]
    before = first[0].path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_model", lambda *_: pytest.fail("the model was loaded for nothing"))
        again = ablate(one.run, [7, 0], config)
    assert [(made.result.latent, made.is_new) for made in again] == [(7, False), (0, False)]
    assert again[1].result == first[0].result
    Terminal().say(AblateAnalysis([0]), again)
    assert "0 results written, 2 were there already" in capsys.readouterr().err
    mixed = ablate(one.run, [0, 20], config)
    assert [made.is_new for made in mixed] == [False, True]
    other = ablate(one.run, [0], config, scale=0.5)
    assert other[0].replaced == ("settings.scale: 0.0 -> 0.5",)
    first[0].path.unlink()
    assert ablate(one.run, [0], config)[0].path.read_bytes() == before


def test_the_pages_can_read_it(subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject("llama")
    (made,) = ablate(one.run, [7], one.config(tmp_path))
    facts = ablation_facts(json.loads(made.path.read_text()), str)
    assert facts["raised"][0][0] == str(made.result.raised[0].token)
    assert facts["numbers"]["kl"] == pytest.approx(made.result.kl, rel=1e-3)


@pytest.mark.parametrize(
    ("latents", "message"), [([31], "latents 0 to 30, and no latent 31"), ([-1], "no latent -1"), ([], "no latent was")]
)
def test_mistakes(latents: list[int], message: str, subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject("llama")
    with pytest.raises(UserError, match=message):
        ablate(one.run, latents, one.config(tmp_path))
    assert not (tmp_path / "ablations").exists()


def test_where_latents_fire_against_loops(val_set: ShardSet, made: Any) -> None:
    transcoder = made.transcoder(input="normalized")
    latents = [3, 40, 11]
    split = val_set.val
    for n_contexts in (13, 7):
        found = find_firing(transcoder, val_set, split, latents, n_contexts)
        counts, largest = torch.zeros(3, n_contexts, dtype=torch.int64), torch.zeros(3)
        context = 0
        for shard, n in enumerate(split.shard_contexts):
            tokens, source = split.tokens(shard), split.activations("source", shard)
            for c in range(n):
                for p in range(val_set.ctx_len):
                    if context >= n_contexts or int(tokens[c, p]) in val_set.manifest.special_ids:
                        continue
                    x = apply_convention(source[p, c], "normalized", source_site="resid_mid", norm=val_set.norm)
                    acts = transcoder.encode(x[None])[0, latents]
                    counts[:, context] += acts > 0
                    largest = largest.maximum(acts)
                context += 1
        assert torch.equal(found.counts, counts)
        torch.testing.assert_close(found.largest, largest)
        assert bool((counts > 0).any())
