"""Absorption and sparse probing: what a transcoder's latents say of things that are known from elsewhere."""
