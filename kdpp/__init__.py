"""kdpp: few-step diffusion models, made better while they sample.

`TeacherGuidedDenoiser` joins a student with the teacher that it was distilled from;
``sample_*_tg`` are k-diffusion's samplers with the teacher's help (Distillation++, Park et al.,
ICCV 2025). `SOLVERS` lists them.
"""

from kdpp import kdiffusion
from kdpp._version import __version__
from kdpp.denoisers import OwnCFG
from kdpp.editing import image_to_image, inpaint, truncate
from kdpp.guidance import NoiseRange, Teacher, TeacherGuidedDenoiser, sds_scale
from kdpp.models import (
    FlowDenoiser,
    GuidanceConditioned,
    LCMDenoiser,
    X0Denoiser,
    as_flow,
    as_ve,
)
from kdpp.rollouts import Rollout, encode, mixed_rollout
from kdpp.solvers import (
    SOLVERS,
    sample_ddim_stochastic_tg,
    sample_dpm_2_ancestral_tg,
    sample_dpm_2_tg,
    sample_dpm_fast_tg,
    sample_dpmpp_2m_ancestral_tg,
    sample_dpmpp_2m_cfg_pp_tg,
    sample_dpmpp_2m_sde_tg,
    sample_dpmpp_2m_tg,
    sample_dpmpp_2s_ancestral_cfg_pp_tg,
    sample_dpmpp_2s_ancestral_tg,
    sample_dpmpp_3m_sde_o3_tg,
    sample_dpmpp_3m_sde_tg,
    sample_dpmpp_sde_tg,
    sample_euler_ancestral_cfg_pp_tg,
    sample_euler_ancestral_tg,
    sample_euler_cfg_pp_tg,
    sample_euler_tg,
    sample_heun_tg,
    sample_lcm_tg,
    sample_lms_tg,
    sample_unipc_tg,
)

__all__ = [
    "SOLVERS",
    "FlowDenoiser",
    "GuidanceConditioned",
    "LCMDenoiser",
    "NoiseRange",
    "OwnCFG",
    "Rollout",
    "Teacher",
    "TeacherGuidedDenoiser",
    "X0Denoiser",
    "__version__",
    "as_flow",
    "as_ve",
    "encode",
    "image_to_image",
    "inpaint",
    "kdiffusion",
    "mixed_rollout",
    "sample_ddim_stochastic_tg",
    "sample_dpm_2_ancestral_tg",
    "sample_dpm_2_tg",
    "sample_dpm_fast_tg",
    "sample_dpmpp_2m_ancestral_tg",
    "sample_dpmpp_2m_cfg_pp_tg",
    "sample_dpmpp_2m_sde_tg",
    "sample_dpmpp_2m_tg",
    "sample_dpmpp_2s_ancestral_cfg_pp_tg",
    "sample_dpmpp_2s_ancestral_tg",
    "sample_dpmpp_3m_sde_o3_tg",
    "sample_dpmpp_3m_sde_tg",
    "sample_dpmpp_sde_tg",
    "sample_euler_ancestral_cfg_pp_tg",
    "sample_euler_ancestral_tg",
    "sample_euler_cfg_pp_tg",
    "sample_euler_tg",
    "sample_heun_tg",
    "sample_lcm_tg",
    "sample_lms_tg",
    "sample_unipc_tg",
    "sds_scale",
    "truncate",
]
