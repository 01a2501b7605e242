"""RUN, RUN@PREFIX or another project's transcoder: which weights are meant, and which shard set they belong to."""
