"""What the commands of `evaluate` share: options, notes and bars, and the command to type next."""
