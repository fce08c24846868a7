"""Sampling on an NVIDIA GPU: the fused loop, and the Triton kernels that it is made of."""
