"""Making models with a generator: requests, the engine, noise, solvers, and files written token by token."""
