"""Check of a teacher on a few training images before the first step.

It finds a wrong normalisation, a wrong order of channels or classes, a softmax inside, and missing weights.

The teacher runs on a few crops, about 0.26 million pixels in all, and its outputs are compared with the labels. If they
could fit better, it also runs on the first crop in BGR order and under other common normalisations. The best of these
runs on all crops, and is reported only if it fits the labels clearly better, so that a correct but weak teacher causes
no warning.
"""

from bpkd_sdk.training.teacher_check.check import TeacherCheck, TeacherWarning, check_teacher, warn_about_teacher
from bpkd_sdk.training.teacher_check.scores import output_kind

__all__ = ["TeacherCheck", "TeacherWarning", "check_teacher", "output_kind", "warn_about_teacher"]
