"""Teachers: vision transformers whose blocks a SparseFormer inherits and whose outputs it is trained to reproduce."""

from sparse_vlm.teachers.base import Teacher, TeacherError, TeacherOutput, TeacherSpec
from sparse_vlm.teachers.load import is_teacher, load_teacher, split_tag

__all__ = ["Teacher", "TeacherError", "TeacherOutput", "TeacherSpec", "is_teacher", "load_teacher", "split_tag"]
