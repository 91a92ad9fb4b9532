"""What `kdpp` makes public: all of its names, from the files that they are in."""

from kdpp import kdiffusion, solvers
from kdpp.algebra import Weighted, WeightedSum, autoguidance, handover, two_model_cfg
from kdpp.capturing import capture
from kdpp.driver import sample
from kdpp.editing import image_to_image, inpaint, truncate
from kdpp.guidance import Teacher, TeacherGuidedDenoiser, sds_scale
from kdpp.kinds import OwnCFG
from kdpp.memory import Borrowed, swapped, without_adapters
from kdpp.models import (
    FlowDenoiser,
    FlowMapDenoiser,
    GuidanceConditioned,
    HostModel,
    LCMDenoiser,
    TrigFlowDenoiser,
    X0Denoiser,
    as_flow,
    as_ve,
)
from kdpp.noise import BrownianNoise, SeededNoise, row_seeds
from kdpp.reflection import Reflection
from kdpp.rollouts import Rollout, encode, mixed_rollout
from kdpp.solver import SOLVERS, Option, Solver, solver
from kdpp.solvers import *
from kdpp.stacking import stack_teachers
from kdpp.steps import NoiseRange

__all__ = [
    "SOLVERS",
    "Borrowed",
    "BrownianNoise",
    "FlowDenoiser",
    "FlowMapDenoiser",
    "GuidanceConditioned",
    "HostModel",
    "LCMDenoiser",
    "NoiseRange",
    "Option",
    "OwnCFG",
    "Reflection",
    "Rollout",
    "SeededNoise",
    "Solver",
    "Teacher",
    "TeacherGuidedDenoiser",
    "TrigFlowDenoiser",
    "Weighted",
    "WeightedSum",
    "X0Denoiser",
    "as_flow",
    "as_ve",
    "autoguidance",
    "capture",
    "encode",
    "handover",
    "image_to_image",
    "inpaint",
    "kdiffusion",
    "mixed_rollout",
    "row_seeds",
    "sample",
    "sds_scale",
    "solver",
    "stack_teachers",
    "swapped",
    "truncate",
    "two_model_cfg",
    "without_adapters",
]
__all__ += [name for name in vars(solvers) if name.startswith("sample_")]
