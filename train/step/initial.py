"""The weights a run starts from, made block by block: beside the state itself a start takes little memory.

With `init: pairs` and fewer rows than latents it takes all of these rows once in fp32, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batches.conditioning import Conditioning
from .step import StepState

_BLOCK_ELEMENTS = 1 << 22
"""Of one matrix: 16 MiB."""
_DRAWN_TOGETHER = 16
"""torch.randn on the CPU draws numbers in sets of this many, the last set anew where it is not full: blocks of a
multiple of it are the numbers of one draw."""


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
    """A fresh StepState on the device of `conditioning`, or its part for some of the `latents`, with the same values.

    pairs: latent i starts from training row i of `source` [rows, d_in] and `target` [rows, d_out]: W_dec[i] is the
    centred target and W_enc[i] the conditioned source, both of unit norm, the latter divided by sqrt(d_in).
    tied: W_dec rows are random and of unit norm and W_enc their copy divided likewise (when d_in == d_out, else
    the encoder rows are random too). Rows are used again when there are fewer than d_sae. b_dec = mean(y).
    """
    d_in, d_out, n_rows = source.shape[1], target.shape[1], source.shape[0]
    held = range(d_sae) if latents is None else latents
    device, mean = conditioning.mean_y.device, conditioning.mean_y / conditioning.s_y
    W_enc, W_dec = (torch.empty(len(held), width, device=device) for width in (d_in, d_out))

    def sources(rows: Tensor) -> Tensor:
        return conditioning.input(rows.to(device))

    def targets(rows: Tensor) -> Tensor:
        return conditioning.target(rows.to(device)) - mean

    def drawn(width: int) -> Iterator[tuple[slice, Tensor]]:
        """Normal rows of the held latents: which of them, and [block, width]."""
        for block in _blocks(d_sae, width):
            # Drawn whole and on the CPU, so that a seed gives the same weights on every device and every part.
            rows = torch.randn(len(block), width, generator=generator)
            here, numbers = _held(held, block)
            yield here, rows[numbers.start - block.start :: numbers.step][: len(numbers)].to(device)

    if init == "pairs":
        for block in _blocks(d_sae, max(d_in, d_out)):
            here, numbers = _held(held, block)
            rows = torch.arange(numbers.start, numbers.stop, numbers.step) % n_rows
            W_dec[here], W_enc[here] = targets(target[rows]), sources(source[rows])
        if d_sae > n_rows:
            # Latents that share a row would stay equal for ever.
            for weight, deviation in ((W_dec, targets(target).std()), (W_enc, sources(source).std())):
                for here, noise in drawn(weight.shape[1]):
                    weight[here] += noise * deviation * 0.1
    else:
        for here, rows in drawn(d_out):
            W_dec[here] = rows
        if d_in == d_out:
            W_enc.copy_(W_dec)
        else:
            for here, rows in drawn(d_in):
                W_enc[here] = rows
    for here, random in drawn(d_in):
        W_enc[here] = _unit_rows(W_enc[here], random) / math.sqrt(d_in)
    for here, random in drawn(d_out):
        W_dec[here] = _unit_rows(W_dec[here], random)
    return StepState.adopt(
        W_enc=W_enc,
        b_enc=torch.zeros(len(held), device=device),
        W_dec=W_dec,
        b_dec=mean,
        W_skip=torch.zeros(d_in, d_out, device=device) if skip else None,
    )


def _blocks(d_sae: int, width: int) -> list[range]:
    """The latents in blocks of about _BLOCK_ELEMENTS / width, each of a multiple of _DRAWN_TOGETHER but the last."""
    size = max(1, _BLOCK_ELEMENTS // (width * _DRAWN_TOGETHER)) * _DRAWN_TOGETHER
    # The last block takes what is too little for one of its own.
    starts = [start for start in range(0, d_sae, size) if start == 0 or d_sae - start >= _DRAWN_TOGETHER]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], d_sae], strict=True)]


def _held(held: range, block: range) -> tuple[slice, range]:
    """The latents of `block` that are in `held`: where they are in it, and their numbers in the dictionary."""
    first, last = (len(range(held.start, end, held.step)) for end in (block.start, block.stop))
    return slice(first, last), held[first:last]


def _unit_rows(rows: Tensor, random: Tensor) -> Tensor:
    """Rows of norm 1; a row of zeros (a target equal to the mean) becomes a random one."""
    empty = rows.norm(dim=1, keepdim=True) < 1e-12
    return F.normalize(torch.where(empty, random, rows), dim=1)
