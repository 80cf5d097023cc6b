"""Checkpoints on disk: `reader` gets tensors out of safetensors shards, `writer` puts them into a staged folder."""
