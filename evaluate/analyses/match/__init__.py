"""`evaluate match`: which latents of one transcoder another one has too."""
