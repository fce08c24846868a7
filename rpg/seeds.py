"""Seeds for every purpose from one seed of the run."""

import hashlib


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A 63-bit seed for one purpose and number, independent of all others."""
    text = f"{seed}/{purpose}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1
