"""Independent seeds, derived from the one seed of a run."""

import hashlib


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A 63-bit seed for one purpose and number, independent of the seeds for others."""
    text = f"{seed}/{purpose}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1
