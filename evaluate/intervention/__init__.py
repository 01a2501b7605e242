"""What a transcoder, or one of its latents, does to the language model that it was harvested from."""
