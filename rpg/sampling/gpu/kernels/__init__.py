"""Triton kernels of the sampling loop on a GPU; each has its plain PyTorch equal elsewhere in the library.

Triton comes with PyTorch on Linux. Where there is no GPU only tests import this, which run the kernels in
Triton's interpreter.
"""
