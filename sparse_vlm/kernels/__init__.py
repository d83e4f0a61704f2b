"""A look in one kernel: bilinear sampling, parameter generation and mixing, so that a token's parameters never reach memory."""

from sparse_vlm.kernels.dispatch import convolve, look, usable, using

__all__ = ["convolve", "look", "usable", "using"]
