"""Kernels for inference on CPUs, in C++."""
