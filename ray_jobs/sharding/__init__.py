"""The two passes of stage `shard`, and how one that was killed goes on."""
