"""`evaluate compare`: transcoders of any origin on identical rows, at equal L0."""
