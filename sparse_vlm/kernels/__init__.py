"""Fused kernels: sampling and mixing, sampling alone, and the early convolution, in Triton; CPU inference, in C++."""

from sparse_vlm.kernels.dispatch import convolve, has_cpu_kernels, has_cpu_linear, is_supported, sample, sample_and_mix, using

# names of earlier versions
compiled, look, multiplies, usable = has_cpu_kernels, sample_and_mix, has_cpu_linear, is_supported

__all__ = ["convolve", "has_cpu_kernels", "has_cpu_linear", "is_supported", "sample", "sample_and_mix", "using"]
