"""From shards to batches on the device: the stream, its conditioning, the rows set aside."""
