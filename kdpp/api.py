"""What `kdpp` makes public: all of its names, from the files that they are in."""

from kdpp import kdiffusion, solvers
from kdpp.capturing import capture
from kdpp.driver import sample
from kdpp.editing import image_to_image, inpaint, truncate
from kdpp.guidance import NoiseRange, Teacher, TeacherGuidedDenoiser, sds_scale
from kdpp.kinds import OwnCFG
from kdpp.memory import Borrowed, swapped, without_adapters
from kdpp.models import (
    FlowDenoiser,
    GuidanceConditioned,
    HostModel,
    LCMDenoiser,
    X0Denoiser,
    as_flow,
    as_ve,
)
from kdpp.noise import BrownianNoise, SeededNoise, row_seeds
from kdpp.rollouts import Rollout, encode, mixed_rollout
from kdpp.solver import SOLVERS, Option, Solver, solver
from kdpp.solvers import *
from kdpp.stacking import stack_teachers

__all__ = [
    "SOLVERS",
    "Borrowed",
    "BrownianNoise",
    "FlowDenoiser",
    "GuidanceConditioned",
    "HostModel",
    "LCMDenoiser",
    "NoiseRange",
    "Option",
    "OwnCFG",
    "Rollout",
    "SeededNoise",
    "Solver",
    "Teacher",
    "TeacherGuidedDenoiser",
    "X0Denoiser",
    "as_flow",
    "as_ve",
    "capture",
    "encode",
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
    "without_adapters",
]
__all__ += [name for name in vars(solvers) if name.startswith("sample_")]
