"""Generators on Ray Serve: the replica of one, their applications, and the reconciler of what is served."""
