"""Rows, contexts, windows and words of a shard set, numbered in one way."""
