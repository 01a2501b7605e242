"""The maths of norms and of the input conventions."""

from __future__ import annotations

import pytest
import torch

from matryoshka.errors import UserError
from matryoshka.norms import Norm, apply_convention
from matryoshka.sites import input_conventions as conventions_of


def random_norm(kind, d=12, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gain = torch.randn(d, generator=generator)
    return Norm(kind, 1e-3, gain, torch.randn(d, generator=generator) if bias else None)


def random_rows(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).add(0.5).to(dtype)


def slow_norm(norm, row):
    """One row, in python floats, straight from the definition."""
    values = [float(v) for v in row]
    if norm.kind == "layer":
        mean = sum(values) / len(values)
        values = [v - mean for v in values]
    scale = (sum(v * v for v in values) / len(values) + norm.eps) ** 0.5
    n = [v / scale for v in values]
    bias = [0.0] * len(n) if norm.bias is None else [float(b) for b in norm.bias]
    return n, [v * float(g) + b for v, g, b in zip(n, norm.gain, bias, strict=True)]


@pytest.mark.parametrize(("kind", "bias"), [("rms", False), ("layer", False), ("layer", True)])
def test_norm_equals_the_definition(kind, bias):
    norm = random_norm(kind, bias=bias)
    x = random_rows(3, 5, 12)
    n, u = norm.normalized(x), norm.with_gain(x)
    for i in range(3):
        for j in range(5):
            slow_n, slow_u = slow_norm(norm, x[i, j])
            torch.testing.assert_close(n[i, j], torch.tensor(slow_n), atol=2e-6, rtol=2e-6)
            torch.testing.assert_close(u[i, j], torch.tensor(slow_u), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_16_bit_rows_are_reduced_in_float32(kind, dtype):
    norm = random_norm(kind)
    x = random_rows(7, 12, dtype=dtype) * 100  # squares overflow float16
    for convention in ("normalized", "mlp_in"):
        got = apply_convention(x, convention, source_site="resid_mid", norm=norm)
        assert got.dtype == torch.float32
        assert torch.equal(got, apply_convention(x.float(), convention, source_site="resid_mid", norm=norm))
        assert got.isfinite().all()


def test_apply_convention_dispatches():
    norm = random_norm("layer", bias=True)
    x = random_rows(4, 12)
    for source_site, sublayer in (("resid_mid", "mlp_in"), ("resid_pre", "attn_in")):
        options = {"source_site": source_site, "norm": norm}
        assert torch.equal(apply_convention(x, source_site, **options), x)
        assert torch.equal(apply_convention(x, "normalized", **options), norm.normalized(x))
        assert torch.equal(apply_convention(x, sublayer, **options), norm.with_gain(x))
    raw = apply_convention(x.bfloat16(), "attn_out", source_site="attn_out", norm=None)
    assert torch.equal(raw, x.bfloat16().float())
    assert not torch.equal(norm.normalized(x), norm.with_gain(x))


def test_apply_convention_leaves_its_input_alone():
    norm = random_norm("layer", bias=True)
    x = random_rows(4, 12)
    before = x.clone()
    for convention in conventions_of("resid_mid"):
        apply_convention(x, convention, source_site="resid_mid", norm=norm)
    assert torch.equal(x, before)


def test_a_convention_that_cannot_be_applied_says_why():
    x = random_rows(4, 12)
    with pytest.raises(UserError, match="none is stored"):
        apply_convention(x, "mlp_in", source_site="resid_mid", norm=None)
    with pytest.raises(UserError, match="resid_mid, normalized, mlp_in"):
        apply_convention(x, "attn_in", source_site="resid_mid", norm=random_norm("rms"))
    with pytest.raises(UserError, match="12 dimensions and the norm has 10"):
        apply_convention(x, "mlp_in", source_site="resid_mid", norm=random_norm("rms", d=10))
    with pytest.raises(UserError, match="kind"):
        Norm("batch", 1e-5, torch.ones(3))  # pyright: ignore
