"""Stage one: run a language model once and write paired activations with their tokens."""
