"""Everything a run carries from step to step, and nothing else: weights, Adam moments, threshold, counters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from matryoshka.errors import UserError

UNIT_NORM_TOLERANCE = 1e-3


@dataclass(eq=False, kw_only=True, slots=True)
class StepState:
    """The state of a run between two steps.

    W_enc is kept as ROWS, [d_sae, d_in], so that one latent's weights are contiguous; it is transposed when a
    transcoder is saved. Rows of W_dec have unit norm. All floating tensors are fp32. `threshold` is 0 until the
    first batch that fires assigns it. `tokens_since_fired` counts training rows.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None = None
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    step: Tensor
    threshold: Tensor
    tokens_since_fired: Tensor

    @classmethod
    def create(
        cls, *, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, W_skip: Tensor | None = None
    ) -> Self:
        """`adopt` of fp32 copies of the weights."""
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        if W_skip is not None:
            weights["W_skip"] = W_skip
        return cls.adopt(**{n: t.detach().to(torch.float32, copy=True).contiguous() for n, t in weights.items()})

    @classmethod
    def adopt(cls, *, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, W_skip: Tensor | None = None) -> Self:
        """A fresh state at step 0 of these fp32 weights themselves, which its steps will change.

        W_enc [d_sae, d_in] (rows!), b_enc [d_sae], W_dec [d_sae, d_out] with rows of unit norm, b_dec [d_out],
        W_skip [d_in, d_out] or None. Raises UserError when shapes disagree, a value is not finite, or a decoder
        row is not of unit norm (the projection of the gradient is only right for unit rows).
        """
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        if W_skip is not None:
            weights["W_skip"] = W_skip
        d_sae, d_in, d_out = W_enc.shape[0], W_enc.shape[-1], W_dec.shape[-1]
        expected = {
            "W_enc": (d_sae, d_in),
            "b_enc": (d_sae,),
            "W_dec": (d_sae, d_out),
            "b_dec": (d_out,),
            "W_skip": (d_in, d_out),
        }
        for name, tensor in weights.items():
            if tuple(tensor.shape) != expected[name]:
                raise UserError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {expected[name]} (W_enc is given as rows, "
                    "[d_sae, d_in]); pass weights whose shapes agree."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{name} holds NaN or infinite values; start from finite weights.")
        norms = W_dec.norm(dim=1)
        worst = float((norms - 1).abs().max())
        if worst > UNIT_NORM_TOLERANCE:
            raise UserError(
                f"A row of W_dec has a norm {worst:.3g} away from 1; decoder rows must have unit norm. Divide each "
                "row by its norm and multiply the matching row of W_enc and entry of b_enc by it."
            )
        return cls(
            **weights,
            exp_avg={n: torch.zeros_like(t) for n, t in weights.items()},
            exp_avg_sq={n: torch.zeros_like(t) for n, t in weights.items()},
            step=torch.zeros((), dtype=torch.int64, device=W_enc.device),
            threshold=torch.zeros((), dtype=torch.float32, device=W_enc.device),
            tokens_since_fired=torch.zeros(d_sae, dtype=torch.int64, device=W_enc.device),
        )

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors by name; W_skip only when there is one."""
        named = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return named if self.W_skip is None else {**named, "W_skip": self.W_skip}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under a flat name, ready for safetensors.

        The weights under their own names, then "adam.exp_avg.<name>", "adam.exp_avg_sq.<name>", "step" (int64, 0-d),
        "threshold" (fp32, 0-d), "tokens_since_fired" (int64). These are the live tensors: the next step changes them.
        """
        flat = dict(self.weights())
        flat |= {f"adam.exp_avg.{name}": t for name, t in self.exp_avg.items()}
        flat |= {f"adam.exp_avg_sq.{name}": t for name, t in self.exp_avg_sq.items()}
        return flat | {
            "step": self.step,
            "threshold": self.threshold,
            "tokens_since_fired": self.tokens_since_fired,
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite this state with what `tensors()` gave. Raises UserError, changing nothing, if it does not fit."""
        own = self.tensors()
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or extra:
            raise UserError(
                f"The saved optimizer state does not belong to this run: missing {missing}, unexpected {extra}. "
                "Resume with the configuration the checkpoint was written with."
            )
        for name, tensor in own.items():
            saved = tensors[name]
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                raise UserError(
                    f"The saved {name} is {saved.dtype} {tuple(saved.shape)}, expected {tensor.dtype} "
                    f"{tuple(tensor.shape)}; resume with the configuration the checkpoint was written with."
                )
        for name in self.weights():
            if not bool(torch.isfinite(tensors[name]).all()):
                raise UserError(f"The saved {name} holds NaN or infinite values; resume from an earlier checkpoint.")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def to(self, device: torch.device) -> None:
        """Move every tensor to `device`, in place."""
        for name, tensor in self.weights().items():
            setattr(self, name, tensor.to(device))
        self.exp_avg = {n: t.to(device) for n, t in self.exp_avg.items()}
        self.exp_avg_sq = {n: t.to(device) for n, t in self.exp_avg_sq.items()}
        self.step, self.threshold = self.step.to(device), self.threshold.to(device)
        self.tokens_since_fired = self.tokens_since_fired.to(device)
