"""Devices, atomic files, checked JSON."""
