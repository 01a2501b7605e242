"""`evaluate steer`: the model continues a text with one latent added."""
