"""`evaluate run`: reconstruction, sparsity and use of latents, per nested prefix."""
