"""`evaluate logits`: direct logit attribution, the tokens a latent promotes and suppresses."""
