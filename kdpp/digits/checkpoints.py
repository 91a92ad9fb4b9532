"""The digits' networks, as they ship with kdpp."""

from __future__ import annotations

from kdpp.lab.models import load_classifier as load_classifier_of
from kdpp.lab.models import load_model
from kdpp.lab.networks import Classifier, VNetwork


def load_teacher() -> VNetwork:
    """The teacher, frozen; as a model of the lab it is ``load_model("digits:teacher")``."""
    return load_model("digits:teacher").network


def load_student() -> VNetwork:
    """The few-step student, frozen; as a model of the lab ``load_model("digits:student")``."""
    return load_model("digits:student").network


def load_classifier() -> Classifier:
    """The classifier of digits, frozen."""
    return load_classifier_of("digits:classifier")
