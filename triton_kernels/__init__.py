"""Triton kernels: the portable second implementation, shipped as ``aqlm_infer.triton_kernels``."""
