"""The step over several ranks: rows or latents split among them."""
