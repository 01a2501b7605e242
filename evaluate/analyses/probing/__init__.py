"""`evaluate probing`: k-sparse probing."""
