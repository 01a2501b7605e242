"""Direct logit effects against a loop over Hugging Face's own weights, and the files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from evaluate.analysis import Answer, answer
from evaluate.intervention import logit_effects
from evaluate.intervention import logits as module
from evaluate.intervention.logit_effects import token_effects
from evaluate.intervention.logits import Logits, LogitsAnalysis
from matryoshka.lm.unembedding import Unembedding
from matryoshka.norms import Norm

MODELS = ("gemma2", "llama", "gpt2")


def make_logits(one: Any, *place: Path, **settings: Any) -> Answer[Logits]:
    (found,) = answer(LogitsAnalysis(), [one.run], one.config(*place, **settings))
    return found


def twin(subject: Any, latent: int) -> list[float]:
    """The effect of one latent on every token, by the equation, from the weights as transformers names them."""
    plain = subject.plain()
    row = subject.transcoder.W_dec[latent].double()
    if subject.kind == "gpt2":
        gain, W_U = plain.transformer.ln_f.weight.double(), plain.lm_head.weight.double()
        row = row - row.mean()
    else:
        gain, W_U = plain.model.norm.weight.double(), plain.lm_head.weight.double()
        gain = gain + 1 if subject.kind == "gemma2" else gain
    n_tokens = len(subject.model.tokenizer)
    factors, columns = (row * gain).tolist(), W_U.tolist()
    effects = [sum(a * b for a, b in zip(factors, columns[t], strict=True)) for t in range(n_tokens)]
    mean = sum(effects) / n_tokens
    return [effect - mean for effect in effects]


@pytest.mark.parametrize("kind", MODELS)
def test_against_a_loop(kind: str, subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject(kind)
    found = make_logits(one, tmp_path, logits={"top": 4})
    assert found.result.norm == ("layer" if kind == "gpt2" else "rms")
    table = pq.read_table(tmp_path / "logits.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "latent": "int32",
        "side": "int8",
        "rank": "int16",
        "token": "int32",
        "effect": "float",
    }
    rows = table.to_pylist()
    assert len(rows) == 31 * 2 * 4
    for latent in range(31):
        effects = twin(one, latent)
        order = sorted(range(len(effects)), key=effects.__getitem__)
        for side, best in ((1, order[::-1]), (-1, order)):
            here = [row for row in rows if row["latent"] == latent and row["side"] == side]
            assert [row["rank"] for row in here] == [0, 1, 2, 3]
            assert [row["token"] for row in here] == best[:4]
            assert [row["effect"] for row in here] == pytest.approx([effects[t] for t in best[:4]], rel=1e-3, abs=1e-4)
    # by latent, raised before lowered
    assert [(row["latent"], -row["side"], row["rank"]) for row in rows] == sorted(
        (row["latent"], -row["side"], row["rank"]) for row in rows
    )


def test_by_hand() -> None:
    """Two dimensions with gains 2 and 1; row (1, 3) becomes (2, 3): on (1, 0), (0, 1), (-1, -1) it is 2, 3, -5."""
    unembedding = Unembedding(
        Norm("rms", 1e-6, torch.tensor([2.0, 1.0])), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [99.0, 99.0]])
    )
    found = token_effects(torch.tensor([[1.0, 3.0]]), unembedding, 3, 2)
    assert (found.raised.tolist(), found.raised_by.tolist()) == ([[1, 0]], [[3.0, 2.0]])
    assert (found.lowered.tolist(), found.lowered_by.tolist()) == ([[2, 0]], [[-5.0, 2.0]])


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    unembedding = Unembedding(
        Norm("layer", 1e-5, torch.rand(7, generator=generator)), torch.randn(50, 7, generator=generator)
    )
    rows = torch.randn(11, 7, generator=generator)
    whole = token_effects(rows, unembedding, 47, 6)
    monkeypatch.setattr(logit_effects, "_TOKENS_AT_ONCE", 5)  # fewer than `top`, and 47 is no multiple of it
    monkeypatch.setattr(logit_effects, "_TILE_BYTES", 4 * 5 * 3)
    tiled = token_effects(rows, unembedding, 47, 6)
    for name in ("raised", "lowered"):
        assert torch.equal(getattr(whole, name), getattr(tiled, name))
        torch.testing.assert_close(getattr(whole, name + "_by"), getattr(tiled, name + "_by"))
    assert int(whole.raised.max()) < 47
    assert token_effects(rows, unembedding, 3, 6).raised.shape == (11, 3)


def test_the_effect_is_that_of_the_model(subject: Callable[[str], Any]) -> None:
    """A little of a latent's row, added to the last residual, moves the logits as the table says."""
    one = subject("llama")
    tokens = torch.tensor([one.contexts()[0][0]])
    point = f"blocks.{one.model.n_layers - 1}.hook_resid_post"
    r = one.model.capture(tokens, [point])[point][0, -1].double()
    row = one.transcoder.W_dec[3].double()
    row = row - r * (row @ r) / (r @ r)  # across r, so that the norm's scale stays the same in first order
    effects = token_effects(row.float()[None], one.model.unembedding, len(one.model.tokenizer), 5)
    step = 0.01
    moved = one.model.logits(tokens, {point: lambda t: t + step * row.float()})[0, -1].double()
    change = (moved - one.model.logits(tokens)[0, -1].double()) / step * r.pow(2).mean().sqrt()
    change = change - change.mean()
    assert change.topk(5).indices.tolist() == effects.raised[0].tolist()
    assert change.topk(5).values.tolist() == pytest.approx(effects.raised_by[0].tolist(), rel=0.05)


def test_it_is_made_once_and_its_bytes_are_equal(
    subject: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = subject("gemma2")

    def digests(folder: Path) -> list[str]:
        return [hashlib.sha256((folder / f"logits.{end}").read_bytes()).hexdigest() for end in ("parquet", "json")]

    first = make_logits(one, tmp_path / "a")
    assert digests(make_logits(one, tmp_path / "b").path.parent) == digests(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_model", lambda *_: pytest.fail("the model was loaded for nothing"))
        # what cannot change an effect is no reason to make them again
        again = make_logits(one, tmp_path / "a", tokens=7, seed=3)
    assert not again.is_new
    assert again.result == first.result
    other = make_logits(one, tmp_path / "a", logits={"top": 2})
    assert other.replaced == ("settings.top: 10 -> 2",)
    (tmp_path / "a" / "logits.json").write_text("{}")
    assert make_logits(one, tmp_path / "a", logits={"top": 2}).is_new
