"""The solvers: for each one its rows of coefficients, then its public ``sample_*_tg`` function.

Every function samples a `kdpp.TeacherGuidedDenoiser` and takes what k-diffusion's sampler of the
same name takes, in the same positions:

- ``x``: the starting latent ``(batch, *shape)``, with noise of standard deviation ``sigmas[0]``;
  floating point, in model space. Never written to; the result has its dtype and device.
- ``sigmas``: 1-D, non-increasing noise standard deviations, usually ending in 0. Solvers without
  noise also take levels that never fall, from above 0 (for a flow model to below 1): from an image
  to the noise that leads to it. No teacher is asked on the way up.
- ``extra_args``: what the models take: ``cond``, ``uncond``, ``cond_scale``, …
- ``callback``: called once a step with k-diffusion's dict (``x, i, sigma, sigma_hat, denoised``),
  at guided steps also ``denoised_student, renoised, denoised_teacher, denoised_revised``.
- ``disable``: True hides the progress bar.
- ``s_churn``, ``s_tmin``, ``s_tmax``: Karras et al.'s churn and the σ that it is bounded to; for a
  flow model σ = τ/(1-τ).
- ``eta``: 0 the ODE … 1 fully ancestral; ``s_noise``: factor on added noise;
  ``noise_sampler(sigma, sigma_next)``: source of standard normal noise, by default k-diffusion's.
- ``variable``: what the rule takes for the noise level. "sigma": σ. "tau": ``τ = σ/(1+σ)`` and the
  state ``z = (1-τ) x``, a flow model's own, as ComfyUI runs flow models. The rule is the same, the
  numbers are not; the teacher's term is.

They raise TypeError or ValueError, before any network call, for a model that is not wrapped, an
integer latent, sigmas that are not 1-D, finite, non-negative and non-increasing, a negative eta or
s_noise, or a missing ``uncond``; at the call that shows it, for output or noise of a wrong shape.

The files: `euler` (first order, random), `singlestep` (two or three evaluations a step),
`multistep` (2M, RES 2M, LMS, UniPC), `slopes` (iPNDM, DEIS, gradient estimation, UD10 AB), `sde`,
`stochastic` (ER-SDE, SEEDS, SA-Solver), `adaptive` (DPM-Solver with steps of its own choosing). To
add a solver, write its plan under ``@solver(…)`` and, for use by hand, its public function:
docs/adding_a_solver.md. Every property test then runs over it.
"""

from kdpp.solvers.adaptive import *
from kdpp.solvers.euler import *
from kdpp.solvers.multistep import *
from kdpp.solvers.sde import *
from kdpp.solvers.singlestep import *
from kdpp.solvers.slopes import *
from kdpp.solvers.stochastic import *
