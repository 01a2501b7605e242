"""The weights a run starts from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .conditioning import Conditioning
from .step import StepState


def initial_state(
    *,
    d_sae: int,
    source: Tensor,
    target: Tensor,
    conditioning: Conditioning,
    init: str,
    init_scale: float,
    skip: bool,
    generator: torch.Generator,
) -> StepState:
    """A fresh StepState.

    pairs: latent i starts from training row i of `source` [rows, d_in] and `target` [rows, d_out]: W_dec[i] is the
    centred target and W_enc[i] the conditioned source, both of unit norm, the latter times init_scale / sqrt(d_in).
    tied: W_dec rows are random and of unit norm and W_enc their copy times the same factor (when d_in == d_out, else
    the encoder rows are random too). Rows are used again when there are fewer than d_sae. b_dec = mean(y).
    """
    d_in, d_out = source.shape[1], target.shape[1]
    if init == "pairs":
        rows = torch.arange(d_sae) % source.shape[0]
        decoder = conditioning.target(target)[rows] - conditioning.mean_y / conditioning.s_y
        encoder = conditioning.input(source)[rows]
        if d_sae > source.shape[0]:
            # Latents that share a row would stay equal for ever.
            decoder = decoder + _randn(decoder, generator) * decoder.std() * 0.1
            encoder = encoder + _randn(encoder, generator) * encoder.std() * 0.1
    else:
        decoder = _randn(torch.empty(d_sae, d_out, device=source.device), generator)
        encoder = decoder if d_in == d_out else _randn(torch.empty(d_sae, d_in, device=source.device), generator)
    W_skip = torch.zeros(d_in, d_out, device=source.device) if skip else None
    return StepState.create(
        W_enc=_unit_rows(encoder, generator) * (init_scale / math.sqrt(d_in)),
        b_enc=torch.zeros(d_sae, device=source.device),
        W_dec=_unit_rows(decoder, generator),
        b_dec=conditioning.mean_y / conditioning.s_y,
        W_skip=W_skip,
    )


def _unit_rows(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of norm 1; a row of zeros (a target equal to the mean) becomes a random one."""
    empty = rows.norm(dim=1, keepdim=True) < 1e-12
    return F.normalize(torch.where(empty, _randn(rows, generator), rows), dim=1)


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that a seed gives the same weights on every device.
    return torch.randn(like.shape, generator=generator).to(like.device)
