"""Commands that run the language model, and what all share: options, notes and bars, the command to type next."""
