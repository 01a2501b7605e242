"""How latents relate: which fire together, which imply which, which point the same way, which match another run's."""
