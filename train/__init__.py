"""Stage two: stream a shard set into Matryoshka transcoders, without the language model."""
