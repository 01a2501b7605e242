"""The last step of a language model: from the residual stream to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matryoshka.errors import UserError
from matryoshka.norms import Norm, fit_norm

# Rank correlation with the model's own logits, above which what follows W_U is monotone; 16-bit logits have many ties.
_SAME_ORDER = 0.97
# Relative L2 difference up to which our formula of what follows W_U is the model's.
_SAME_LOGITS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of the soft cap on the logits in the configurations of transformers (Gemma, RecurrentGemma, xLSTM)."""


def soft_cap_of(config: Any) -> float | None:
    """The soft cap on the logits in a configuration of transformers; None without one."""
    text = config.get_text_config()
    return next((float(cap) for name in _SOFT_CAPS if (cap := getattr(text, name, None))), None)


@dataclass(frozen=True, eq=False)
class Unembedding:
    """logits = g(norm(r) @ W_U.T + b_U) of the last residual r, with g monotone in each logit (a soft cap, a scale)."""

    norm: Norm
    W_U: Float[Tensor, "n_tokens d_model"]
    """In the model's dtype, on its device; its own weights, not a copy."""
    factor: float | None = 1.0
    """g(x) = factor * x, or soft_cap * tanh(factor * x / soft_cap); None where g is of another form."""
    soft_cap: float | None = None

    @classmethod
    def fit(
        cls,
        norm: nn.Module | None,
        head: Any,
        residual: Tensor,
        logits: Tensor,
        name: str,
        soft_cap: float | None = None,
    ) -> Unembedding:
        """Read them off a loaded model, and check them.

        Args:
            norm: the model's last norm, head: the module that gives its logits.
            residual: [..., d_model] of some tokens after the last block, logits: [..., n_tokens] of the same tokens.
            name: of the model, for messages.
            soft_cap: what the model's configuration says of it.

        Raises:
            UserError: the logits are not made of one norm of a known form and one matrix.
        """
        weight = getattr(head, "weight", None)
        if norm is None or weight is None:
            raise _unknown(name, "it has no final norm or no unembedding")
        with torch.inference_mode():
            fitted = fit_norm(norm, residual, norm(residual))
            if fitted is None:
                raise _unknown(name, f"its final norm, a {type(norm).__name__}, is of another form")
            own = fitted.with_gain(residual) @ weight.float().T
            bias = getattr(head, "bias", None)
            own = own if bias is None else own + bias.float()
        if _rank_correlation(own, logits) < _SAME_ORDER:
            raise _unknown(name, "something else is between its last block and its logits")
        factor = _factor(own, logits, soft_cap)
        return cls(fitted, weight, factor, None if factor is None else soft_cap)

    def scales(self, residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, " *rows"]:
        """What a logit moves, before a soft cap, when `effect_directions(v) @ W_U.T` is 1 and a little of v is added to
        a last residual r: factor / sqrt(mean((r [- mean(r)])^2) + eps), the norm's scale held fixed. float32."""
        assert self.factor is not None
        r = residual.float()
        if self.norm.kind == "layer":
            r = r - r.mean(-1, keepdim=True)
        return self.factor * (r.pow(2).mean(-1) + self.norm.eps).rsqrt()

    def effect_directions(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """What reaches W_U of vectors added to the last residual, when the norm's scale is held fixed and is 1.

        norm(r + v) - norm(r) = (v [- mean(v)]) * gain / scale(r); the mean only for a LayerNorm. float32.
        """
        v = directions.float()
        if self.norm.kind == "layer":
            v = v - v.mean(-1, keepdim=True)
        return v * self.norm.gain.to(v.device)


def _unknown(name: str, why: str) -> UserError:
    return UserError(
        f"the effect of a latent on the logits of {name} cannot be computed from its weights: {why}. Use `evaluate "
        "ablate`, which runs the model"
    )


def _factor(own: Tensor, logits: Tensor, soft_cap: float | None) -> float | None:
    """`Unembedding.factor`, by least squares where there is no cap; 1 where it is near that."""
    # Some models give -inf to ids that they never want.
    known = logits.isfinite()
    x, found = own[known].double().cpu(), logits[known].double().cpu()
    tolerance = _SAME_LOGITS[logits.dtype]
    factor = 1.0 if soft_cap is not None else float((x @ found) / (x @ x))
    factor = 1.0 if abs(factor - 1) < tolerance else factor
    again = factor * x if soft_cap is None else soft_cap * torch.tanh(factor * x / soft_cap)
    return factor if float((again - found).norm() / found.norm()) < tolerance else None


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, over the last dimension, the smallest of all rows."""
    ranks = [x.float().flatten(0, -2).argsort(-1).argsort(-1).double().cpu() for x in (a, b)]
    a, b = (x - x.mean(-1, keepdim=True) for x in ranks)
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).min())
