"""Sampling on an NVIDIA GPU: the fused loop, its denoisers and kernels, and what brings results to the host.

Everything here has an equal in plain PyTorch elsewhere in the library, which the tests compare it with.
"""
