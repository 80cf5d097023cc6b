"""Checkpoints on disk: `reader` reads tensors from safetensors shards, `writer` writes them into a staged folder."""
