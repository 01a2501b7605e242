"""The final norm and the unembedding are those of the model: they give its logits again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.lm.unembedding import Unembedding, _factor, _rank_correlation

MODELS = {"tiny_gemma2": "rms", "tiny_llama": "rms", "tiny_gpt2": "layer"}


@pytest.mark.parametrize("name", MODELS)
def test_logits_again(name: str, load: Callable[..., LanguageModel]) -> None:
    model = load(name)
    tokens = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    point = f"blocks.{model.n_layers - 1}.hook_resid_post"
    residual = model.capture(tokens, [point])[point]
    found = model.unembedding
    logits = found.norm.with_gain(residual) @ found.W_U.T
    if name == "tiny_gemma2":  # final_logit_softcapping of its configuration
        logits = 30 * torch.tanh(logits / 30)
    torch.testing.assert_close(logits, model.logits(tokens), atol=1e-4, rtol=1e-4)
    assert found.norm.kind == MODELS[name]
    assert found.W_U.shape == (model.logits(tokens).shape[-1], model.d_model)
    assert model.unembedding is found


@pytest.mark.parametrize("name", MODELS)
def test_it_is_recognised_in_bfloat16_too(name: str, load: Callable[..., LanguageModel]) -> None:
    assert load(name, "bfloat16").unembedding.norm.kind == MODELS[name]


@pytest.mark.parametrize("name", MODELS)
def test_what_a_direction_adds(name: str, load: Callable[..., LanguageModel]) -> None:
    """(norm(r + v) - norm(r)) * scale, with the scale of r + v put in by hand."""
    model = load(name)
    norm = model.unembedding.norm
    generator = torch.Generator().manual_seed(2)
    r, v = torch.randn(2, 4, model.d_model, generator=generator).double()
    gain = norm.gain.double()

    def centred(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x

    scale = (centred(r).pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    with_v, without = (centred(x) / scale * gain for x in (r + v, r))
    expected = (with_v - without) * scale
    torch.testing.assert_close(model.unembedding.effect_directions(v).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_after_the_matrix(name: str, load: Callable[..., LanguageModel]) -> None:
    for dtype in ("float32", "bfloat16"):
        found = load(name, dtype).unembedding
        # final_logit_softcapping of its configuration
        assert (found.factor, found.soft_cap) == (1.0, 30.0 if name == "tiny_gemma2" else None)


@pytest.mark.parametrize("name", MODELS)
def test_the_scale_of_each_row(name: str, load: Callable[..., LanguageModel]) -> None:
    found = load(name).unembedding
    rows = 3 * torch.randn(2, 5, found.norm.gain.shape[0], generator=torch.Generator().manual_seed(4)) + 1
    for i in range(2):
        for j in range(5):
            row = rows[i, j].tolist()
            mean = sum(row) / len(row) if found.norm.kind == "layer" else 0.0
            square = sum((x - mean) ** 2 for x in row) / len(row)
            assert float(found.scales(rows)[i, j]) == pytest.approx((square + found.norm.eps) ** -0.5, rel=1e-5)


def test_a_factor_a_cap_and_something_else_after_the_matrix(load: Callable[..., LanguageModel]) -> None:
    model = load("tiny_llama")
    tokens = torch.arange(4, 12)[None]
    point = f"blocks.{model.n_layers - 1}.hook_resid_post"
    residual, logits = model.capture(tokens, [point])[point], model.logits(tokens)
    parts: tuple[Any, Any] = (model._points.final_norm, model._model.get_output_embeddings())
    # Granite divides its logits, Cohere multiplies them.
    divided = Unembedding.fit(*parts, residual, logits / 8, "it")
    assert divided.factor == pytest.approx(1 / 8, rel=1e-4)
    assert divided.scales(residual) == pytest.approx(model.unembedding.scales(residual) / 8, rel=1e-4)
    cap = float(logits.abs().max()) / 2
    capped = cap * torch.tanh(logits / cap)
    found = Unembedding.fit(*parts, residual, capped, "it", cap)
    assert (found.factor, found.soft_cap) == (1.0, cap)
    assert Unembedding.fit(*parts, residual, capped, "it").factor is None
    wanted = logits.index_fill(-1, torch.tensor([3]), -torch.inf)  # an id that is never wanted
    assert _factor(2 * logits, wanted, None) == pytest.approx(0.5)


def test_a_model_that_does_more_is_refused(load: Callable[..., LanguageModel]) -> None:
    model = load("tiny_llama")
    tokens = torch.arange(4, 12)[None]
    point = f"blocks.{model.n_layers - 1}.hook_resid_post"
    residual, logits = model.capture(tokens, [point])[point], model.logits(tokens)
    parts: tuple[Any, Any] = (model._points.final_norm, model._model.get_output_embeddings())
    with pytest.raises(UserError, match="something else is between"):
        Unembedding.fit(*parts, residual, logits.roll(1, -1), "it")
    with pytest.raises(UserError, match="no final norm or no unembedding"):
        Unembedding.fit(None, parts[1], residual, logits, "it")


def test_rank_correlation_by_hand() -> None:
    """Ranks 0 1 2 3 against 0 1 3 2: 1 - 6 * 2 / (4 * 15) = 0.8; the smaller of two rows counts."""
    a = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4]])
    assert _rank_correlation(a, a.exp()) == pytest.approx(1)
    assert _rank_correlation(a, torch.tensor([[1.0, 2, 4, 3], [5, 6, 7, 8]])) == pytest.approx(0.8)


def test_post_norm_models_have_an_unembedding_too(tiny_olmo2: Path) -> None:
    model = LanguageModel.load(str(tiny_olmo2), dtype="float32", device="cpu")
    assert model.unembedding.norm.kind == "rms"
