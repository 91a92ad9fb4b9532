"""A whole run as one compiled function, or one CUDA graph."""

from functools import partial

import pytest
import torch

import kdpp
import needs
import problems
from kdpp import capture
from problems import karras, run, seeded
from test_calls import Net

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
BATCH, STEPS = 3, 3


@pytest.fixture
def traced(monkeypatch):
    """torch.compile that traces in full and runs the trace as it is: no compiler, fast."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def guided(**settings):
    """Two small networks; the teacher speaks at two steps, with CFG and two draws."""
    teacher = kdpp.Teacher(Net(1), scale=0.3, steps=2, cfg_scale=3.0, draws=2, **settings)
    return kdpp.TeacherGuidedDenoiser(Net(0), teacher)


def latent(seed=5, device="cpu"):
    return (seeded(BATCH, *problems.SHAPE, seed=seed, dtype=torch.float32) * 14).to(device)


def conditions(seed=1, device="cpu"):
    cond, uncond = (seeded(BATCH, 3, seed=s, dtype=torch.float32) for s in (seed, seed + 1))
    return {"cond": cond.to(device), "uncond": uncond.to(device), "cond_scale": 2.0}


def options(solver):
    """Churn where there is any; plain noise for the SDE solvers."""
    plain = {"s_churn": 1.0, "noise_sampler": lambda *_: torch.randn(BATCH, *problems.SHAPE)}
    return {name: value for name, value in plain.items() if problems.accepts(solver, name)}


@over_solvers
def test_the_loop_is_one_trace_and_gives_the_sampler_s_images(solver, traced):
    """fullgraph=True for every solver, guided; new latents, conditions and seeds, no new trace."""
    model, sigmas = guided(), karras(STEPS).float()
    captured = capture(solver, model, latent(), sigmas, conditions(), **options(solver))
    images = []
    for seed in range(3):
        x, extra = latent(seed), conditions(seed)
        torch.manual_seed(seed)
        images.append(captured(x, extra))
        torch.manual_seed(seed)
        expected = run(solver, model, x, sigmas, extra_args=extra, **options(solver))
        assert torch.allclose(images[-1], expected, atol=1e-5)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert frames == 1
    assert not torch.allclose(images[0], images[1], atol=1e-3)


@needs.compiler
def test_the_default_compiler_makes_the_same_images():
    """Inductor's code for a guided, ancestral run."""
    torch._dynamo.reset()
    solver = kdpp.SOLVERS["euler_ancestral"]
    model, sigmas = guided(), karras(2).float()
    captured = capture(solver, model, latent(), sigmas, conditions())
    torch.manual_seed(3)
    found = captured(latent())
    torch.manual_seed(3)
    expected = run(solver, model, latent(), sigmas, extra_args=conditions())
    assert torch.allclose(found, expected, atol=1e-5)


def test_draws_differ_from_run_to_run(traced):
    """The same latent twice: other noise, as the sampler itself would draw."""
    sample = kdpp.sample_euler_ancestral_tg
    captured = capture(sample, guided(), latent(), karras(STEPS).float(), conditions())
    torch.manual_seed(0)
    one, two = captured(latent()), captured(latent())
    assert not torch.allclose(one, two, atol=1e-3)
    torch.manual_seed(0)
    assert torch.equal(captured(latent()), one)


def test_many_runs_can_be_captured(traced):
    """Torch keeps eight traces of a function; a ninth schedule does not find them used up."""
    for steps in range(1, 11):
        sigmas = karras(steps).float()
        captured = capture(kdpp.sample_euler_tg, guided(), latent(), sigmas, conditions())
        assert captured(latent()).isfinite().all()


def test_16_bit_networks_are_captured_with_their_state(traced):
    """The state in float32 inside, the latent's dtype outside."""
    model = kdpp.TeacherGuidedDenoiser(Net(0).bfloat16(), Net(1).bfloat16(), teacher_cfg_scale=1.0)
    x, sigmas = latent().bfloat16(), karras(STEPS).float()
    extra = {"cond": torch.zeros(BATCH, 3, dtype=torch.bfloat16)}
    torch.manual_seed(0)
    found = capture(kdpp.sample_dpmpp_2m_tg, model, x, sigmas, extra)(x)
    torch.manual_seed(0)
    expected = kdpp.sample_dpmpp_2m_tg(model, x, sigmas, extra, disable=True)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=0.02)


def test_only_a_sampler_of_kdpp_is_captured():
    """A function around one would lose what it does besides: refused, whatever it is called."""
    image, euler = latent(), kdpp.sample_euler_tg

    def sample_euler_tg(model, x, sigmas, extra_args=None, **options):
        return kdpp.image_to_image(euler, model, image, sigmas, extra_args, disable=True)

    def twice(model, x, sigmas, extra_args=None, **options):
        return euler(model, euler(model, x, sigmas, extra_args), sigmas, extra_args)

    for function in (sample_euler_tg, twice, print):
        with pytest.raises(ValueError, match="is no sampler of kdpp"):
            capture(function, guided(), latent(), karras(STEPS), conditions())


@pytest.mark.parametrize(
    "given", ["euler_ancestral", "sample_euler_ancestral_tg",
              partial(kdpp.sample_euler_ancestral_tg, eta=0.5)],
)  # fmt: skip
def test_a_sampler_may_be_named_or_partial(given, traced):
    """Fixed options hold."""
    fixed = given.keywords if isinstance(given, partial) else {}
    model, sigmas = guided(), karras(STEPS).float()
    captured = capture(given, model, latent(), sigmas, conditions())
    torch.manual_seed(0)
    found = captured(latent())
    torch.manual_seed(0)
    expected = kdpp.sample_euler_ancestral_tg(
        model, latent(), sigmas, conditions(), disable=True, **fixed
    )
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_teachers_draws_are_those_that_are_used(rho, traced):
    """At ρ = 0 a teacher draws nothing, and a second one gets the noise of its own level."""

    def by_level(sigma, sigma_s):
        return seeded(BATCH, *problems.SHAPE, seed=round(100 * float(sigma_s))).float()

    teachers = [kdpp.Teacher(Net(1), 0.3, renoise=0.4, renoise_eta=rho)]
    teachers += [kdpp.Teacher(Net(2), 0.3, renoise=0.8)]
    model = kdpp.TeacherGuidedDenoiser(Net(0), teachers, renoise_noise_sampler=by_level)
    captured = capture("euler", model, latent(), karras(STEPS).float(), conditions())
    torch.manual_seed(0)
    found = captured(latent())
    torch.manual_seed(0)
    expected = kdpp.sample("euler", model, latent(), karras(STEPS).float(), conditions())
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_cannot_be_captured_is_refused():
    """Before anything is compiled."""
    x, sigmas, euler = latent(), karras(STEPS), kdpp.sample_euler_tg
    with pytest.raises(ValueError, match='"compile" or "graph"'):
        capture(euler, guided(), x, sigmas, mode="fast")
    with pytest.raises(ValueError, match="callback"):
        capture(euler, guided(), x, sigmas, callback=print)
    with pytest.raises(ValueError, match="nothing to capture"):
        capture(euler, guided(), x, sigmas[:1])
    with pytest.raises(ValueError, match="maps"):
        capture(euler, guided(maps=(torch.neg, torch.neg)), x, sigmas, conditions())
    moved = kdpp.TeacherGuidedDenoiser(Net(0), kdpp.swapped(Net(1), list, list))
    with pytest.raises(ValueError, match="comes and goes, cannot be captured"):
        capture(euler, moved, x, sigmas, conditions())
    with pytest.raises(ValueError, match="must not increase"):
        capture(euler, guided(), x, sigmas.flip(0), conditions())
    # Nothing stays switched: the sampler itself samples.
    assert not torch.equal(euler(guided(), x, sigmas, conditions(), disable=True), x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_a_graph_needs_cuda():
    """In one sentence."""
    with pytest.raises(RuntimeError, match="records CUDA kernels; x lies on cpu"):
        capture(kdpp.sample_euler_tg, guided(), latent(), karras(2), conditions(), mode="graph")


@needs.cuda
@over_solvers
def test_a_graph_replays_with_new_latents_conditions_and_seeds(solver):
    """One launch a run; the sampler's own images."""
    model, sigmas = guided().cuda(), karras(STEPS).float()
    given = options(solver)
    if "noise_sampler" in given:
        given["noise_sampler"] = lambda *_: torch.randn(BATCH, *problems.SHAPE, device="cuda")
    first = (latent(device="cuda"), sigmas, conditions(device="cuda"))
    captured = capture(solver, model, *first, mode="graph", **given)
    images = []
    for seed in range(3):
        x, extra = latent(seed, "cuda"), conditions(seed, "cuda")
        torch.manual_seed(seed)
        images.append(captured(x, extra))
        torch.manual_seed(seed)
        expected = run(solver, model, x, sigmas, extra_args=extra, **given)
        assert torch.allclose(images[-1], expected, atol=1e-4)
    assert len({image.data_ptr() for image in images}) == 3
    with pytest.raises(ValueError, match="capture anew"):
        captured(x[:1], extra)


@needs.cuda
def test_a_graph_s_draws_differ_from_replay_to_replay():
    """The same latent twice: other noise."""
    sample, sigmas = kdpp.sample_euler_ancestral_tg, karras(STEPS).float()
    x, extra = latent(device="cuda"), conditions(device="cuda")
    captured = capture(sample, guided().cuda(), x, sigmas, extra, mode="graph")
    assert not torch.allclose(captured(x), captured(x), atol=1e-3)
