"""`evaluate samples`: windows of text that show what each latent is about."""
