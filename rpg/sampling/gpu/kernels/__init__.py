"""Triton kernels of the sampling loop.

Triton comes with PyTorch on Linux. On a machine without a GPU only the tests import these modules, and run
the kernels in Triton's interpreter.
"""
