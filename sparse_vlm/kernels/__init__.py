"""Looks (bilinear sampling, parameter generation and mixing, fused) and the early convolution as Triton kernels."""

from sparse_vlm.kernels.dispatch import convolve, look, usable, using

__all__ = ["convolve", "look", "usable", "using"]
