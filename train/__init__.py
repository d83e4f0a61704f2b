"""Loops that make towers and vision-language models."""
