"""Sampling and mixing, sampling alone, and the early convolution as Triton kernels; needs triton."""
