"""Looks (bilinear sampling, parameter generation and mixing, fused), sampling by itself, and the early convolution as Triton kernels."""

from sparse_vlm.kernels.dispatch import convolve, look, sample, usable, using

__all__ = ["convolve", "look", "sample", "usable", "using"]
