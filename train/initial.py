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
    skip: bool,
    generator: torch.Generator,
    latents: range | None = None,
) -> StepState:
    """A fresh StepState, or its part for some of the `latents`, with the same values.

    pairs: latent i starts from training row i of `source` [rows, d_in] and `target` [rows, d_out]: W_dec[i] is the
    centred target and W_enc[i] the conditioned source, both of unit norm, the latter divided by sqrt(d_in).
    tied: W_dec rows are random and of unit norm and W_enc their copy divided likewise (when d_in == d_out, else
    the encoder rows are random too). Rows are used again when there are fewer than d_sae. b_dec = mean(y).
    """
    d_in, d_out = source.shape[1], target.shape[1]
    part = slice(None) if latents is None else slice(latents.start, latents.stop, latents.step)

    def randn(width: int) -> Tensor:
        # Drawn whole and on the CPU, so that a seed gives the same weights on every device and every part.
        return torch.randn(d_sae, width, generator=generator)[part].to(source.device)

    if init == "pairs":
        rows = torch.arange(d_sae)[part] % source.shape[0]
        targets = conditioning.target(target) - conditioning.mean_y / conditioning.s_y
        sources = conditioning.input(source)
        decoder, encoder = targets[rows], sources[rows]
        if d_sae > source.shape[0]:
            # Latents that share a row would stay equal for ever.
            decoder = decoder + randn(d_out) * targets.std() * 0.1
            encoder = encoder + randn(d_in) * sources.std() * 0.1
    else:
        decoder = randn(d_out)
        encoder = decoder if d_in == d_out else randn(d_in)
    W_skip = torch.zeros(d_in, d_out, device=source.device) if skip else None
    return StepState.create(
        W_enc=_unit_rows(encoder, randn(d_in)) / math.sqrt(d_in),
        b_enc=torch.zeros(len(decoder), device=source.device),
        W_dec=_unit_rows(decoder, randn(d_out)),
        b_dec=conditioning.mean_y / conditioning.s_y,
        W_skip=W_skip,
    )


def _unit_rows(rows: Tensor, random: Tensor) -> Tensor:
    """Rows of norm 1; a row of zeros (a target equal to the mean) becomes a random one."""
    empty = rows.norm(dim=1, keepdim=True) < 1e-12
    return F.normalize(torch.where(empty, random, rows), dim=1)
