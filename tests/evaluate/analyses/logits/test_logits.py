"""Direct logit effects against a loop over Hugging Face's own weights, and the files."""

from __future__ import annotations

import copy
import hashlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from evaluate.analyses.logits import effects as logit_effects
from evaluate.analyses.logits import logits as module
from evaluate.analyses.logits.effects import TokenEffects, effect_tiles
from evaluate.analyses.logits.logits import Logits, LogitsAnalysis
from evaluate.analysis import Answer, answer
from matryoshka.lm.unembedding import Unembedding
from matryoshka.norms import Norm
from matryoshka.runs import publish_json

MODELS = ("gemma2", "llama", "gpt2")


def token_effects(W_dec: torch.Tensor, unembedding: Unembedding, n_tokens: int, top: int) -> TokenEffects:
    """All tiles in one."""
    found = TokenEffects.empty(min(top, n_tokens))
    for tile in effect_tiles(W_dec, unembedding, n_tokens, top):
        found.extend(tile)
    return found


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


@torch.no_grad()
def last_residuals(one: Any, n_contexts: int) -> list[torch.Tensor]:
    """What the final norm of the plain model reads at the ordinary positions of the first val contexts, float64."""
    plain, seen = one.plain(), []
    norm = plain.transformer.ln_f if one.kind == "gpt2" else plain.model.norm
    handle = norm.register_forward_pre_hook(lambda _m, given: seen.append(given[0][0].double()))
    found = []
    for tokens, _ in one.contexts()[:n_contexts]:
        plain(torch.tensor([tokens]))
        found += [r for token, r in zip(tokens, seen.pop(), strict=True) if token not in one.special_ids]
    handle.remove()
    return found


def size(one: Any, r: torch.Tensor) -> float:
    """What the final norm divides by."""
    values = r.tolist()
    mean = sum(values) / len(values) if one.kind == "gpt2" else 0.0
    return (sum((x - mean) ** 2 for x in values) / len(values) + one.model.unembedding.norm.eps) ** 0.5


@pytest.mark.parametrize("kind", MODELS)
def test_the_scale_is_the_median_over_held_out_rows(kind: str, subject: Callable[[str], Any], tmp_path: Path) -> None:
    one = subject(kind)
    for name, tokens, n_contexts in (("all", 4096, 8), ("first", 30, 3)):
        found = make_logits(one, tmp_path / name, logits={"scale_tokens": tokens}, lm={"batch_tokens": 30}).result
        inverse = [1 / size(one, r) for r in last_residuals(one, n_contexts)]
        assert found.scale == pytest.approx(statistics.median(inverse), rel=1e-4)
        assert found.scale_rows == len(inverse)
        assert found.soft_cap == (30.0 if kind == "gemma2" else None)


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_the_effect_times_the_scale_is_what_the_model_does(
    kind: str, subject: Callable[[str], Any], tmp_path: Path
) -> None:
    """A little of a decoder row is added to the last residual of the plain model, at rows of known size."""
    one = subject(kind)
    found = make_logits(one, tmp_path).result
    assert found.scale is not None
    plain, eps = copy.deepcopy(one.plain()).double(), 1e-2
    norm, n_tokens = (plain.transformer.ln_f if kind == "gpt2" else plain.model.norm), len(one.model.tokenizer)

    def logits(r: torch.Tensor) -> torch.Tensor:
        """Of the last residual r, before the soft cap, less their mean."""
        handle = norm.register_forward_pre_hook(lambda _m, given: (r.expand_as(given[0]),))
        # The norms of transformers work in float32: a smaller step would be lost in rounding.
        capped = plain(torch.tensor([[5]])).logits[0, 0, :n_tokens]
        handle.remove()
        free = 30 * torch.atanh(capped / 30) if kind == "gemma2" else capped
        return free - free.mean()

    table = pq.read_table(tmp_path / "logits.parquet").to_pylist()
    rows = sorted(last_residuals(one, 8), key=lambda r: size(one, r))
    median = rows[len(rows) // 2]
    for latent in (3, 17):
        row = one.transcoder.W_dec[latent].double()
        effects = {each["token"]: each["effect"] for each in table if each["latent"] == latent}
        assert len(effects) == 20
        for r in (median, *rows[::25]):
            change = (logits(r + eps * row) - logits(r - eps * row)) / (2 * eps)
            # The row makes r longer or shorter too, which is no part of the effect: there the scale is held fixed.
            centred = r - r.mean() if kind == "gpt2" else r
            longer = row @ centred / len(r) / size(one, r) ** 2
            change = change + longer * (logits(r) - logits(0 * r))
            for token, effect in effects.items():
                assert float(change[token]) == pytest.approx(effect / size(one, r), rel=3e-3, abs=3e-4)
                if r is median:
                    assert float(change[token]) == pytest.approx(effect * found.scale, rel=0.02, abs=1e-4)


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
    # a file of before there was a scale is made again
    old = other.result.model_dump(mode="json", exclude={"scale", "scale_rows", "soft_cap"})
    del old["settings"]["scale_tokens"]
    publish_json(other.path, old)
    assert make_logits(one, tmp_path / "a", logits={"top": 2}).replaced == ("settings.scale_tokens: null -> 4096",)
    (tmp_path / "a" / "logits.json").write_text("{}")
    assert make_logits(one, tmp_path / "a", logits={"top": 2}).is_new
