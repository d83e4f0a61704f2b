"""Bootstrapping a SparseFormer from a teacher, without labels: views, the teacher's outputs, and the loss."""
