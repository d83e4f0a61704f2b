"""Bootstrapping a SparseFormer from a teacher, without labels: views, the teacher's cached answers, and the objective."""
