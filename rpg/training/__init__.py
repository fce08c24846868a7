"""Fitting a generator: what a step sees, the step itself, and the loop over a sharded collection."""
