"""The embedded lab: 8x8 handwritten digits, a teacher, a few-step student and a classifier.

Everything is real and small: UCI's 5,620 digits (`uci/DATA_CARD.md`), a class-conditional diffusion
teacher, a consistency-distilled student with a real gap to it, and the classifier whose features
measure both. All three were trained on the 3,823 digits of one part, by `kdpp train`
(`weights/MODEL_CARD.md`), and are measured against the 1,797 of the other. A network of this
package serves k-diffusion's `CompVisDenoiser` as it is:

    denoiser = kdpp.kdiffusion.external.CompVisDenoiser(load_teacher())
    denoised = denoiser(x, sigma, cond=labels)      # labels: int64 [B], 0-9, or NULL_CLASS
"""

from kdpp.digits.checkpoints import load_classifier, load_student, load_teacher
from kdpp.digits.data import NULL_CLASS, load_data
from kdpp.lab.schedules import SCHEDULE, schedule, trailing

__all__ = [
    "NULL_CLASS",
    "SCHEDULE",
    "load_classifier",
    "load_data",
    "load_student",
    "load_teacher",
    "schedule",
    "trailing",
]
