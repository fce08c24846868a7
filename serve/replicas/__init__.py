"""Generators on Ray Serve: a replica of one, and which of them are served."""
