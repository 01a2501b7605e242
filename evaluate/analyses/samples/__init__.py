"""`evaluate samples` and `evaluate show`: windows of text that show what each latent is about."""
