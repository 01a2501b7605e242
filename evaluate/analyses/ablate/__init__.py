"""`evaluate ablate`: single latents taken out of the model."""
