"""`evaluate hierarchy`: which latents fire together, which imply which, and what each group adds."""
