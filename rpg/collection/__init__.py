"""Checkpoint files, layouts, tokens and Arrow shards."""
