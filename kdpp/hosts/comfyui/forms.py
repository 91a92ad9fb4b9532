"""What ComfyUI runs under its samplers' names, as solvers of kdpp's (docs/solvers.md).

Under some names it has other formulas than k-diffusion, and for flow models most of them over τ. At
λ = 0 these give the picture that its own sampler gives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

import kdpp

__all__ = ["NAMES", "Form", "form_of"]


class Form(NamedTuple):
    """A solver, the options that are fixed in it, and the levels that it gets."""

    solver: kdpp.Solver
    options: dict[str, Any]
    sigmas: Tensor


TAU = {"variable": "tau"}
UNIPC = {"order": 3, "lower_order_final": "always"}
EPSILON: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("euler", {}),
    "ddpm": ("euler_ancestral", {}),
    "dpmpp_2m_cfg_pp": ("dpmpp_2m_cfg_pp_mixed", {}),
    "dpmpp_2m_sde_heun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
    "dpmpp_2s_ancestral_cfg_pp": ("dpmpp_2s_ancestral_cfg_pp_mixed", {}),
    "exp_heun_2_x0": ("res_singlestep", {"r": 1.0}),
    "exp_heun_2_x0_sde": ("seeds_2", {"solver_type": "phi_2", "r": 1.0}),
    "ipndm_v": ("ipndm_v", {"max_order": 4}),
    "lms": ("lms", {"lower_order_final": "at 0"}),
    "uni_pc": ("unipc", {**UNIPC, "variant": "bh1"}),
    "uni_pc_bh2": ("unipc", UNIPC),
}
"""The names whose solver is another than kdpp's of that name."""
FLOW = {
    **EPSILON,
    "deis": ("deis", TAU),
    "dpm_2": ("dpm_2", TAU),
    "dpm_2_ancestral": ("dpm_2_ancestral_rf", {}),
    "dpm_fast": ("dpm_fast", TAU),
    "dpmpp_2m": ("dpmpp_2m", TAU),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral_rf", {}),
    "euler_ancestral": ("euler_ancestral_rf", {}),
    "gradient_estimation": ("gradient_estimation", TAU),
    "heun": ("heun", TAU),
    "heunpp2": ("heunpp2", TAU),
    "ipndm": ("ipndm", TAU),
    "ipndm_v": ("ipndm_v", {"max_order": 4, **TAU}),
    "lms": ("lms", {"lower_order_final": "at 0", **TAU}),
    "res_multistep": ("res_multistep", TAU),
    "uni_pc": ("unipc", {**UNIPC, **TAU, "variant": "bh1"}),
    "uni_pc_bh2": ("unipc", {**UNIPC, **TAU}),
}
"""The same for flow models."""
BELOW_ONE = ("er_sde", "res_singlestep", "sa_solver", "sa_solver_pece", "seeds_2", "seeds_3")
"""Beside those of Brownian noise, the solvers that start a little below τ = 1."""
END_OF_UNIPC = 0.001
NAMES = tuple(dict.fromkeys([*kdpp.SOLVERS, *EPSILON]))
"""All that can be asked for."""


def form_of(name: str, sigmas: Tensor, model_sampling: Any, flow: bool, comfyui: bool) -> Form:
    """The solver of a name and the levels that it gets: ComfyUI's form, or kdpp's own.

    ComfyUI's names that kdpp does not have are in ComfyUI's form always.
    """
    if not comfyui and name in kdpp.SOLVERS:
        return Form(kdpp.SOLVERS[name], {}, sigmas)
    known, options = (FLOW if flow else EPSILON).get(name, (name, {}))
    solver, sigmas = kdpp.SOLVERS[known], sigmas.clone()
    if flow and sigmas[0] >= 1.0 and (solver.noise == "brownian" or known in BELOW_ONE):
        sigmas[0] = model_sampling.percent_to_sigma(1e-4)
    if known.startswith("sa_solver"):
        high, low = (float(model_sampling.percent_to_sigma(part)) for part in (0.2, 0.8))
        if flow:
            high, low = (tau / (1.0 - tau) for tau in (high, low))
        options = {**options, "s_tmin": low, "s_tmax": high}
    if known == "unipc":
        options = {**options, "order": max(1, min(3, len(sigmas) - 2))}
        if sigmas[-1] == 0.0:
            sigmas[-1] = END_OF_UNIPC
    return Form(solver, options, sigmas)
