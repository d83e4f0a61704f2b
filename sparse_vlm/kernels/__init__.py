"""Looks (bilinear sampling, parameter generation and mixing, fused) and the early convolution, in Triton; inference on CPUs, C++."""

from sparse_vlm.kernels.dispatch import compiled, convolve, look, multiplies, sample, usable, using

__all__ = ["compiled", "convolve", "look", "multiplies", "sample", "usable", "using"]
