"""Sampling and mixing, and the early convolution, as Triton kernels; needs triton."""
