"""Stage three: the truth about a transcoder, from the saved shards, without the language model."""
