"""Latents that are named by their numbers."""

from __future__ import annotations

from collections.abc import Sequence

from matryoshka.errors import UserError


def check_latents(d_sae: int, latents: Sequence[int]) -> None:
    """Raise UserError unless there is one and a transcoder of `d_sae` latents has them all."""
    if not latents:
        raise UserError("no latent was named; give one or more numbers, for example 17")
    if wrong := [latent for latent in latents if not 0 <= latent < d_sae]:
        raise UserError(f"the transcoder has the latents 0 to {d_sae - 1}, and no latent {wrong[0]}")
