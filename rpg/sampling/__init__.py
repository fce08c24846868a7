"""Making models with a generator: seeded noise, packed sampling, files written token by token."""
