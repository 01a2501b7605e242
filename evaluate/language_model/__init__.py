"""The language model that a shard set was harvested from, for the analyses that need it."""
