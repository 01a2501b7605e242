"""Text with and without a latent, and the latents of any text, against plain hooks and dense activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate.analyses.steer.steer import Writing, adding, continuation, scaling, steer
from evaluate.analyses.steer.table import show_steered
from evaluate.config import EvaluateConfig
from evaluate.language_model.text_probe import TextProbe
from matryoshka.errors import UserError

MODELS = ("gemma2", "llama", "gpt2")
TEXT = "w3 w14 w15 w9 w26"


def ids_of(subject: Any, text: str) -> list[int]:
    """The tokens of a text of words w0 w1 ..., which follow the special ones in the vocabulary."""
    first = 1 if subject.kind == "gpt2" else 4
    return [first + int(word[1:]) for word in text.split()]


def largest(subject: Any, latent: int) -> float:
    found = 0.0
    for tokens, _ in subject.contexts():
        seen: list[torch.Tensor] = []

        def look(u: torch.Tensor, target: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(u)
            return target

        subject.logits(tokens, look)
        acts = subject.transcoder.encode(seen[0])[:, latent]
        found = max([found, *(float(a) for a, t in zip(acts, tokens, strict=True) if t not in subject.special_ids)])
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_text_against_plain_hooks(kind: str, subject: Callable[[str], Any]) -> None:
    one = subject(kind)
    latent, scale, n_tokens = 7, 20.0, 6
    found = steer(one.run, latent, TEXT, one.config(), scale=scale, writing=Writing(n_tokens))
    assert found.max_act == pytest.approx(largest(one, latent), rel=1e-2)  # the stored rows are bfloat16
    addition = scale * found.max_act * one.transcoder.W_dec[latent]
    texts = []
    for added in (0.0, 1.0):
        tokens = [one.shards.manifest.bos_id, *ids_of(one, TEXT)]
        n_prompt = len(tokens)
        while len(tokens) < n_prompt + n_tokens:
            special = torch.tensor([token in one.special_ids for token in tokens])[:, None]

            def edit(
                _u: torch.Tensor, target: torch.Tensor, added: float = added, special: torch.Tensor = special
            ) -> torch.Tensor:
                return torch.where(special, target, target + added * addition)

            token = int(one.logits(tokens, edit)[-1, : len(one.model.tokenizer)].argmax())
            if token in one.special_ids:
                break
            tokens.append(token)
        texts.append([f"w{token - (1 if kind == 'gpt2' else 4)}" for token in tokens[n_prompt:]])
    assert [found.plain.split(), found.steered.split()] == texts
    assert texts[0] != texts[1]


@pytest.mark.parametrize("factor", [0.0, 30.0])
@pytest.mark.parametrize("kind", MODELS)
def test_text_with_a_latent_scaled_against_plain_hooks(kind: str, factor: float, subject: Callable[[str], Any]) -> None:
    one = subject(kind)
    probe, latent, n_tokens = TextProbe(one.model, one.transcoder, one.shards), 7, 6
    found = continuation(one.model, probe.tokens(TEXT), Writing(n_tokens), scaling(latent, factor, probe))
    tokens = [one.shards.manifest.bos_id, *ids_of(one, TEXT)]
    n_prompt, n_fires = len(tokens), 0
    while len(tokens) < n_prompt + n_tokens:
        special = torch.tensor([token in one.special_ids for token in tokens])

        def edit(u: torch.Tensor, target: torch.Tensor, special: torch.Tensor = special) -> torch.Tensor:
            nonlocal n_fires
            acts = one.transcoder.encode(u)
            acts[special] = 0
            n_fires += int((acts[:, latent] > 0).sum())
            changed = acts.clone()
            changed[:, latent] *= factor
            return target + one.transcoder.decode(changed) - one.transcoder.decode(acts)

        token = int(one.logits(tokens, edit)[-1, : len(one.model.tokenizer)].argmax())
        if token in one.special_ids:
            break
        tokens.append(token)
    assert found.split() == [f"w{token - (1 if kind == 'gpt2' else 4)}" for token in tokens[n_prompt:]]
    assert n_fires > 0


def test_nothing_added_is_nothing_changed(subject: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = steer(subject("llama").run, 7, TEXT, subject("llama").config(), scale=0.0, writing=Writing(5, 1.0, 3))
    assert found.plain == found.steered
    show_steered(found)
    shown = capsys.readouterr().out
    assert TEXT in shown
    assert "of latent 7" in shown


def test_draws_follow_the_seed_and_the_temperature(subject: Callable[[str], Any]) -> None:
    one = subject("gemma2")
    tokens = TextProbe(one.model, one.transcoder, one.shards).tokens(TEXT)

    def text(temperature: float, seed: int) -> str:
        return continuation(one.model, tokens, Writing(8, temperature, seed))

    assert text(2.0, 1) == text(2.0, 1)
    assert len({text(2.0, seed) for seed in range(4)}) > 1
    assert text(1e-4, 5) == text(0.0, 0)


def test_the_drawn_token_is_that_of_softmax(subject: Callable[[str], Any]) -> None:
    one = subject("llama")
    probe = TextProbe(one.model, one.transcoder, one.shards)
    tokens = probe.tokens(TEXT)
    n_known = len(one.model.tokenizer)
    logits = one.logits(tokens[0].tolist())[-1, :n_known].double()
    p = (logits / 1.5).exp() / (logits / 1.5).exp().sum()
    token = int(torch.multinomial(p.float(), 1, generator=torch.Generator().manual_seed(4)))
    assert continuation(one.model, tokens, Writing(1, 1.5, 4)).split() == [f"w{token - 4}"]


def test_text_ends_at_a_special_token_and_at_the_longest_context(
    subject: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject("llama")
    probe = TextProbe(one.model, one.transcoder, one.shards)
    wanted = iter([40, 41, one.special_ids[1], 42])

    def scripted(tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, tokens.shape[1], 97)
        logits[0, -1, next(wanted)] = 1
        return logits

    monkeypatch.setattr(one.model, "logits", scripted)
    assert continuation(one.model, probe.tokens(TEXT), Writing(20)).split() == ["w36", "w37"]
    monkeypatch.setattr(one.model, "n_ctx", 8)
    wanted = iter([40] * 20)
    assert continuation(one.model, probe.tokens(TEXT), Writing(20)).split() == ["w36"] * 2  # BOS and 5 words are 6


def test_special_positions_keep_their_value(subject: Callable[[str], Any]) -> None:
    one = subject("gpt2")
    probe = TextProbe(one.model, one.transcoder, one.shards)
    tokens = torch.tensor([[0, 5, 0, 9]])
    target = f"blocks.{1}.hook_mlp_out"
    clean = one.model.capture(tokens, [target])[target]
    with adding(torch.ones(one.d), probe)(tokens):
        added = one.model.capture(tokens, [target])[target] - clean
    torch.testing.assert_close(added[0], torch.tensor([0.0, 1, 0, 1])[:, None].expand(4, one.d))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": 31}, "no latent 31"),
        ({"latent": 30}, "latent 30 of l1-k6 fires on none of 93 val rows"),
        ({"text": ""}, "the text has no tokens"),
        ({"text": "w1 " * 64}, "the text has 64 tokens, and .* takes 64"),
        ({"writing": Writing(0)}, "at least one token"),
        ({"writing": Writing(4, -1.0)}, "a temperature of -1.0"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, subject: Callable[[str], Any]) -> None:
    one = subject("llama")
    wanted = {"latent": 7, "text": TEXT, "writing": Writing(3), **changes}
    with pytest.raises(UserError, match=message):
        steer(one.run, wanted["latent"], wanted["text"], one.config(), writing=wanted["writing"])


@pytest.mark.parametrize("kind", MODELS)
def test_top_latents_of_a_text(kind: str, subject: Callable[[str], Any]) -> None:
    one = subject(kind)
    found = TextProbe(one.model, one.transcoder, one.shards).top_latents(TEXT, 4)
    assert [entry["token"].strip() for entry in found] == TEXT.split()
    seen: list[torch.Tensor] = []

    def look(u: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(u)
        return target

    one.logits([one.shards.manifest.bos_id, *ids_of(one, TEXT)], look)
    acts = one.transcoder.encode(seen[0])[1:]
    for entry, row in zip(found, acts.tolist(), strict=True):
        firing = sorted((act, latent) for latent, act in enumerate(row) if act > 0)[::-1][:4]
        assert [pair["latent"] for pair in entry["latents"]] == [latent for _, latent in firing]
        assert [pair["act"] for pair in entry["latents"]] == pytest.approx([act for act, _ in firing], rel=1e-4)
    assert any(entry["latents"] for entry in found)


def test_special_tokens_have_no_latents(subject: Callable[[str], Any]) -> None:
    one = subject("llama")
    probe = TextProbe(one.model, one.transcoder, one.shards)
    assert probe.tokens("w1 nonsense w2")[0].tolist() == [2, 5, 3, 6]  # BOS w1 <unk> w2
    latents = [len(entry["latents"]) for entry in probe.top_latents("w1 nonsense w2", 31)]
    assert latents[1] == 0
    assert latents[0] > 0


def test_the_shard_set_is_that_of_the_run(subject: Callable[[str], Any], made: Any, tmp_path: Path) -> None:
    one = subject("llama")
    run = made.run(tmp_path / "l1-k6", one.transcoder, shards=one.shards)
    writing = Writing(5)
    expected = steer(one.run, 7, TEXT, one.config(), writing=writing)
    assert steer(run, 7, TEXT, EvaluateConfig(device="cpu"), writing=writing) == expected
