"""16-bit networks: the state in float32, the networks in their own dtype."""

import pytest
import torch

import kdpp
import problems
from problems import Counted, Problem, karras, mixture, run, seeded

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
over_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
STEPS = 100
# The rms error over the images' own rms, at 100 steps: what the networks' answers, rounded, cost.
ALLOWED = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
# The exceptions, times that: noise that is added and removed again after two rounded answers; a
# solver that starts anew from its estimate at every step, where samples between two modes go the
# other way; extrapolation over four answers, which amplifies their rounding at small steps.
HARDER = {"dpm_2_ancestral": 1.5, "dpmpp_2s_ancestral_rf": 1.2, "lcm": 4.0, "heunpp2": 1.6,
          "seeds_2": 2.4, "seeds_3": 2.6}  # fmt: skip
CANCELLING = 100.0


class In16(torch.nn.Module):
    """A denoiser that computes in float64 and speaks 16 bits; it refuses anything else."""

    def __init__(self, model, dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x, sigma, **extra_args):
        """The model's answer, rounded."""
        assert x.dtype == sigma.dtype == self.dtype, "a network was given another dtype"
        return self.model(x.double(), sigma.double(), **extra_args).to(self.dtype)


def error(solver, dtype, sigmas=None, **settings):
    """The rms difference of a 16-bit run from the same one in float64, over the images' rms."""
    sigmas = karras(STEPS) if sigmas is None else sigmas
    x = (seeded(64, *problems.SHAPE, seed=3) * sigmas[0]).to(dtype)
    noise = [seeded(*x.shape, seed=100 + i) for i in range(solver.evaluations * len(sigmas))]

    def sample(student, teacher, x, sigmas):
        drawn, again = iter(noise), iter(noise)
        model = kdpp.TeacherGuidedDenoiser(
            student, teacher, teacher_cfg_scale=1.0,
            renoise_noise_sampler=lambda *_: next(again), **settings,
        )  # fmt: skip
        options = {"noise_sampler": lambda *_: next(drawn)}
        extra = {"cond": x.new_zeros(64, 3), "uncond": x.new_zeros(64, 3)}
        return run(solver, model, x, sigmas, extra_args=extra, **options)

    exact = sample(mixture(0), mixture(1), x.double(), sigmas)
    found = sample(In16(mixture(0), dtype), In16(mixture(1), dtype), x, sigmas.float())
    assert found.dtype == dtype
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@over_dtypes
@over_solvers
def test_the_rounding_of_16_bits_stays_small(solver, dtype):
    """At 100 steps the rms error is little more than what rounding the networks' answers makes."""
    if solver.name == "dpmpp_2s_ancestral_cfg_pp_mixed":
        pytest.skip("ComfyUI's 2S CFG++ amplifies any rounding: a tenth of the image in both types")
    assert error(solver, dtype) <= ALLOWED[dtype] * (
        CANCELLING if problems.cancels(solver) else HARDER.get(solver.name, 1.0)
    )


@over_dtypes
def test_the_state_in_16_bits_costs_accuracy(dtype):
    """What the switch is for: the same networks with the state in their dtype, five times worse."""
    euler = kdpp.SOLVERS["euler"]
    assert error(euler, dtype, float32_state=False) > 4.0 * error(euler, dtype)


@over_dtypes
@pytest.mark.parametrize("state", [True, False])
@over_solvers
def test_dtypes_of_state_networks_noise_and_result(solver, dtype, state):
    """Networks see x's dtype; noise and state are float32 unless switched off; x's dtype back."""
    networks = [Counted(mixture(0)), Counted(mixture(1))]
    model = kdpp.TeacherGuidedDenoiser(
        *networks, teacher_scale=0.5, teacher_steps=2, teacher_cfg_scale=3.0, float32_state=state
    )
    x, heard = seeded(2, *problems.SHAPE, seed=3, dtype=dtype) * 5, []
    extra = {"cond": torch.zeros(2, 3), "uncond": torch.ones(2, 3), "cond_scale": 2.0}
    found = run(solver, model, x, karras(4), extra_args=extra, callback=heard.append)
    assert found.dtype == dtype
    calls = networks[0].calls + networks[1].calls
    assert {call.x.dtype for call in calls} == {call.sigma.dtype for call in calls} == {dtype}
    assert len(networks[1].calls) == 2
    keys = ("x", "denoised", "renoised", "denoised_teacher", "denoised_revised")
    inner = torch.float32 if state else dtype
    assert {told[key].dtype for told in heard for key in keys if key in told} == {inner}


def test_guidance_is_combined_before_it_is_rounded():
    """CFG's extrapolation of two 16-bit answers happens in float32."""
    problem = Problem(student=lambda x, sigma, cond: cond[:, :, None, None].expand_as(x).clone())
    model = problem.guided(teacher_steps=0)
    cond, uncond = torch.full((2, 3), 1.0), torch.full((2, 3), 0.9921875)
    extra = {"cond": cond.bfloat16(), "uncond": uncond.bfloat16(), "cond_scale": 3.3}
    heard = []
    x = torch.zeros(2, *problems.SHAPE, dtype=torch.bfloat16)
    kdpp.sample_euler_tg(model, x, torch.tensor([2.0, 0.0]), extra, heard.append, disable=True)
    expected = uncond + 3.3 * (cond - uncond)
    assert torch.allclose(heard[0]["denoised"][:, :, 0, 0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_cast_where_nothing_is_16_bit(dtype):
    """float32 and float64 latents keep their own dtype all the way."""
    problem = Problem()
    x, heard = seeded(2, *problems.SHAPE, seed=3, dtype=dtype), []
    kdpp.sample_euler_tg(problem.guided(), x, karras(3), problem.extra_args, heard.append)
    assert {told["x"].dtype for told in heard} == {dtype}
