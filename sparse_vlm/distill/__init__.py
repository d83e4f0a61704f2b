"""Bootstrapping a SparseFormer from a teacher, without labels: views, the teacher's cached outputs, and the objective."""
