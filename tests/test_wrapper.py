"""The wrapper: any denoiser as student or teacher, any condition, and what a callback sees."""

import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import kdpp
import needs
import problems
import references
from kdpp.kdiffusion import external, layers
from kdpp.solver import solver_of
from problems import (
    SHAPE,
    CFGDenoiser,
    Counted,
    Problem,
    Tape,
    accepts,
    karras,
    mixture,
    relative,
    run,
    seeded,
)

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
SIGMAS = karras(4, low=0.1, high=10.0)


# ------------------------------------------------------------------------- kinds of denoisers


class Network(torch.nn.Module):
    """A small smooth network with a condition, in float64, that any wrapper can hold."""

    def __init__(self, seed, outputs=1):
        super().__init__()
        channels = SHAPE[0]
        self.mix = torch.nn.Parameter(0.4 * seeded(outputs * channels, channels, seed=80 + seed))
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0)

    def forward(self, x, t, cond=None):
        """tanh of a mix of channels, the level and the condition."""
        mixed = torch.einsum("oc,bchw->bohw", self.mix, x)
        moved = 0.0 if cond is None else 0.3 * cond @ self.mix.T
        level = (0.001 * t.to(x.dtype)).reshape(-1, 1, 1, 1)
        moved = moved if cond is None else moved[:, :, None, None]
        return torch.tanh(mixed + moved + level)

    def apply_model(self, x, t, cond):
        """What CompVis' latent diffusion calls it."""
        return self(x, t, cond)


def openai(seed):
    """OpenAI's kind, with learned variances in a second half of the channels."""
    network = Network(seed, outputs=2)
    diffusion = SimpleNamespace(alphas_cumprod=network.alphas_cumprod.numpy())
    return external.OpenAIDenoiser(network, diffusion).double()


KINDS = {
    "CompVisDenoiser": lambda seed: external.CompVisDenoiser(Network(seed)).double(),
    "CompVisVDenoiser": lambda seed: external.CompVisVDenoiser(Network(seed)).double(),
    "OpenAIDenoiser": openai,
    "VDenoiser": lambda seed: external.VDenoiser(Network(seed)),
    "Denoiser": lambda seed: layers.Denoiser(Network(seed), sigma_data=0.5),
    "function": lambda seed: plain_function(mixture(seed)),
}
over_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
STOCK = ["sample_euler", "sample_euler_ancestral", "sample_heun", "sample_dpm_2", "sample_lms"]
STOCK += ["sample_dpmpp_2s_ancestral", "sample_dpmpp_2m"]


def plain_function(model):
    """A denoiser that is no module."""

    def denoise(x, sigma, cond=None):
        return model(x, sigma, cond=cond)

    return denoise


@over_kinds
@over_solvers
def test_any_kind_can_be_student_or_teacher(solver, kind):
    """k-diffusion's denoisers and plain callables, each on both sides, give the reference."""
    if solver.name not in references.REFERENCES:
        pytest.skip("no reference is written for this solver")
    guidance = {"teacher_scale": 0.4, "teacher_steps": 2}
    for student, teacher in ((kind(1), mixture(1)), (mixture(0), kind(2))):
        problem = Problem(student=student, teacher=teacher)
        x = problem.start(SIGMAS)
        expected = references.expected(solver, problem, x, SIGMAS, guidance)
        assert relative(problem.sample(solver, x, SIGMAS, guidance), expected) <= 1e-10


@needs.k_diffusion
@pytest.mark.parametrize("name", STOCK)
@over_kinds
def test_in_a_stock_sampler_it_is_the_student(kind, name):
    """k-diffusion's own samplers on the wrapper give what they give on a scripts' CFGDenoiser."""
    problem = Problem(student=kind(1), teacher=kind(2))
    x, sample = problem.start(SIGMAS), getattr(needs.k_sampling, name)
    results = []
    for model in (CFGDenoiser(problem.student), problem.guided()):
        torch.manual_seed(81)
        results.append(sample(model, x, SIGMAS, extra_args=problem.extra_args, disable=True))
    assert relative(results[1], results[0]) <= 1e-12


def test_calling_it_is_calling_the_student():
    """Without conditions, with one, and with CFG."""
    problem = Problem()
    model, student = problem.guided(), problem.student
    x, sigma = problem.start(SIGMAS), torch.full((2,), 3.0, dtype=torch.float64)
    cond, uncond = problem.extra_args["cond"], problem.extra_args["uncond"]
    assert torch.equal(model(x, sigma), student(x, sigma))
    assert torch.equal(model(x, sigma, cond=cond), student(x, sigma, cond=cond))
    one = model(x, sigma, cond=cond, uncond=uncond, cond_scale=1.0)
    assert torch.equal(one, student(x, sigma, cond=cond))
    free, scale = student(x, sigma, cond=uncond), 3.0
    found = model(x, sigma, cond=cond, uncond=uncond, cond_scale=scale)
    assert relative(found, free + scale * (student(x, sigma, cond=cond) - free)) <= 1e-14


def test_it_is_a_module_of_both():
    """Both networks move and list their parameters with it."""
    model = kdpp.TeacherGuidedDenoiser(*(external.VDenoiser(Network(s)) for s in (1, 2)))
    assert isinstance(model, torch.nn.Module)
    assert len(list(model.parameters())) == 2
    assert all(p.dtype == torch.float32 for p in model.float().parameters())


@over_solvers
def test_no_gradient_is_kept(solver):
    """Samplers run without autograd, as k-diffusion's do."""
    problem = Problem(student=external.VDenoiser(Network(1)))
    x = problem.start(SIGMAS).requires_grad_()
    found = run(solver, problem.guided(), x, SIGMAS, extra_args=problem.extra_args)
    assert not found.requires_grad


# ------------------------------------------------------------------------- conditions


class Listening(torch.nn.Module):
    """Keeps what it is called with; its answer depends on one of the condition's leaves."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def forward(self, x, sigma, cond, **extra):
        """A contraction of x, moved by the pooled part of the condition."""
        self.heard.append((x, sigma, cond, extra))
        return 0.2 * x + cond["parts"][1]["pooled"][:, :, None, None]


def sdxl(seed, batch=2):
    """A condition as SDXL's hosts nest it."""
    return {
        "crossattn": seeded(batch, 7, 4, seed=seed),
        "parts": [
            seeded(batch, 5, seed=seed + 1),
            {"pooled": seeded(batch, 3, seed=seed + 2), "label": "size"},
        ],
        "nothing": None,
    }


@over_solvers
def test_nested_conditions_are_batched(solver):
    """Dicts and lists of batch-first tensors: one call of 2B, every leaf doubled alike."""
    student, teacher = Listening(), Listening()
    model = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_cfg_scale=3.0)
    cond, uncond, sizes = sdxl(90), sdxl(95), seeded(2, 6, seed=99)
    extra = {"cond": cond, "uncond": uncond, "cond_scale": 2.0, "sizes": sizes, "flag": "yes"}
    extra["table"] = seeded(5, 2, seed=98)
    run(solver, model, seeded(2, *SHAPE, seed=1), SIGMAS, extra_args=extra)
    for network in (student, teacher):
        assert network.heard
        for x, sigma, heard, others in network.heard:
            assert len(x) == len(sigma) == 4
            assert torch.equal(*x.chunk(2))
            halves = {"cond": cond, "uncond": uncond}
            names = [name for half in (0, 1) for name in halves if holds(heard, half, halves[name])]
            assert sorted(names) == ["cond", "uncond"]
            assert heard["parts"][1]["label"] == "size"
            assert heard["nothing"] is None
            assert set(others) == {"sizes", "flag", "table"}
            assert torch.equal(others["sizes"], torch.cat([sizes, sizes]))
            assert others["flag"] == "yes"
            assert torch.equal(others["table"], extra["table"])


def holds(heard, half, given):
    """Whether half of a doubled condition is, leaf by leaf, the given one."""
    leaves = [
        (heard["crossattn"], given["crossattn"]),
        (heard["parts"][0], given["parts"][0]),
        (heard["parts"][1]["pooled"], given["parts"][1]["pooled"]),
    ]
    return all(torch.equal(doubled.chunk(2)[half], leaf) for doubled, leaf in leaves)


@over_solvers
def test_nested_conditions_give_what_two_calls_give(solver):
    """The estimate under CFG is the one that two calls would give."""
    model = kdpp.TeacherGuidedDenoiser(Listening(), Listening(), teacher_scale=0.0)
    x, sigma = seeded(2, *SHAPE, seed=1), torch.ones(2, dtype=torch.float64)
    cond, uncond = sdxl(90), sdxl(95)
    found = model(x, sigma, cond=cond, uncond=uncond, cond_scale=2.0)
    both = [0.2 * x + c["parts"][1]["pooled"][:, :, None, None] for c in (uncond, cond)]
    assert relative(found, both[0] + 2.0 * (both[1] - both[0])) <= 1e-14
    assert solver is not None


@over_solvers
def test_other_arguments_reach_a_single_batch_as_they_are(solver):
    """cond_scale 1: nothing is doubled, uncond and cond_scale stay behind."""
    if solver.cfg_pp:
        pytest.skip("CFG++ always needs both estimates")
    student = Listening()
    model = kdpp.TeacherGuidedDenoiser(student, Listening(), teacher_scale=0.0)
    sizes = seeded(2, 6, seed=99)
    extra = {"cond": sdxl(90), "uncond": sdxl(95), "sizes": sizes}
    run(solver, model, seeded(2, *SHAPE, seed=1), SIGMAS, extra_args=extra)
    for x, sigma, cond, others in student.heard:
        assert len(x) == len(sigma) == 2
        assert torch.equal(cond["crossattn"], extra["cond"]["crossattn"])
        assert set(others) == {"sizes"}
        assert torch.equal(others["sizes"], sizes)


@over_solvers
def test_networks_are_told_the_latents_level(solver):
    """sigma has one entry per sample, on the latent's device; the first is sigmas[0]."""
    problem = Problem(student=Counted(mixture(0)))
    run(solver, problem.guided(), problem.start(SIGMAS), SIGMAS, extra_args=problem.extra_args)
    for call in problem.student.calls:
        assert call.sigma.shape == (len(call.x),)
        assert call.sigma.is_floating_point()
        assert (call.sigma == call.sigma[0]).all()
    assert float(problem.student.calls[0].sigma[0]) == pytest.approx(float(SIGMAS[0]), rel=1e-15)


# ------------------------------------------------------------------------- denoisers with own CFG


def own(model):
    """A marked CFGDenoiser that hands over its unconditional estimate."""
    guided = CFGDenoiser(model)
    return kdpp.OwnCFG(guided, uncond_denoised=lambda: guided.uncond_denoised)


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("guidance", [{}, {"teacher_steps": 2, "renoise_eta": 0.5}], ids=str)
@over_solvers
def test_own_cfg_gives_what_kdpps_cfg_gives(solver, guidance, sides):
    """A marked CFGDenoiser as student, as teacher or as both changes nothing."""
    problem = Problem()
    x = problem.start(SIGMAS)
    guidance = {"teacher_scale": 0.5, **guidance}
    expected = problem.sample(solver, x, SIGMAS, guidance)
    if sides[0]:
        problem.student = own(problem.student)
    if sides[1]:
        problem.teacher = own(problem.teacher)
    assert relative(problem.sample(solver, x, SIGMAS, guidance), expected) <= 1e-12


@over_solvers
def test_own_cfg_is_taken_as_it_is(solver):
    """It gets all of extra_args unchanged; the teacher with its own cond_scale."""
    heard = {"student": [], "teacher": []}

    def marked(name):
        model = CFGDenoiser(mixture(0))

        def forward(x, sigma, uncond, cond, cond_scale, note=None):
            heard[name].append((len(x), uncond, cond, cond_scale, note))
            return model(x, sigma, uncond, cond, cond_scale)

        return kdpp.OwnCFG(forward, uncond_denoised=lambda: model.uncond_denoised)

    problem = Problem(student=marked("student"), teacher=marked("teacher"))
    extra = {**problem.extra_args, "note": "as it is"}
    run(solver, problem.guided(), problem.start(SIGMAS), SIGMAS, extra_args=extra)
    assert heard["student"]
    assert len(heard["teacher"]) == 1
    for name, scale in (("student", problem.cond_scale), ("teacher", problem.teacher_cfg_scale)):
        for size, uncond, cond, cond_scale, note in heard[name]:
            assert (size, cond_scale, note) == (2, scale, "as it is")
            assert torch.equal(uncond, extra["uncond"])
            assert torch.equal(cond, extra["cond"])


@needs.k_diffusion
def test_own_cfg_in_a_stock_sampler():
    """The wrapper of a marked student is that student."""
    problem = Problem(student=own(mixture(0)))
    x, sample = problem.start(SIGMAS), needs.k_sampling.sample_dpmpp_2m
    expected = sample(CFGDenoiser(mixture(0)), x, SIGMAS, problem.extra_args, disable=True)
    found = sample(problem.guided(), x, SIGMAS, problem.extra_args, disable=True)
    assert relative(found, expected) <= 1e-14


# ------------------------------------------------------------------------- callbacks

THEIRS = {"x", "i", "sigma", "sigma_hat", "denoised"}
OURS = {"denoised_student", "renoised", "denoised_teacher", "denoised_revised"}


def watched(solver, problem, sigmas, x=None, **guidance):
    """A run's callback dicts, copied."""
    seen = []
    x = problem.start(sigmas) if x is None else x
    model = problem.guided(renoise_noise_sampler=Tape(x, 6), **guidance)
    noise = {"noise_sampler": Tape(x, 5)}
    run(
        solver,
        model,
        x,
        sigmas,
        extra_args=problem.extra_args,
        callback=lambda info: seen.append(copied(info)),
        **noise,
    )
    return seen


def copied(info):
    """A callback's dict with its tensors cloned."""
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in info.items()}


@needs.k_diffusion
@pytest.mark.parametrize("solver", [*filter(needs.namesake, SOLVERS)], ids=lambda s: s.name)
def test_an_unguided_callback_is_k_diffusions(solver):
    """λ = 0: the same keys and the same values, step by step."""
    theirs = needs.namesake(solver)
    problem, expected = Problem(), []
    x = problem.start(SIGMAS)
    found = watched(solver, problem, SIGMAS, x, teacher_scale=0.0)
    theirs(
        CFGDenoiser(problem.student),
        x,
        SIGMAS,
        extra_args=problem.extra_args,
        callback=lambda info: expected.append(copied(info)),
        disable=True,
        **({"noise_sampler": Tape(x, 5)} if accepts(solver, "noise_sampler") else {}),
    )
    assert len(found) == len(expected)
    for ours, known in zip(found, expected, strict=True):
        assert set(ours) == set(known) == THEIRS
        assert ours["i"] == known["i"]
        assert relative(ours["x"], known["x"]) <= 1e-12
        assert relative(ours["denoised"], known["denoised"]) <= 1e-12
        for level in ("sigma", "sigma_hat"):
            assert float(ours[level]) == pytest.approx(float(known[level]), rel=1e-12)


@needs.k_diffusion
@pytest.mark.parametrize(
    "name",
    [s.name for s in SOLVERS if accepts(s, "s_churn") and s.name != "heunpp2"],  # not there
)
def test_a_churned_callback_is_k_diffusions(name):
    """With churn, x and sigma_hat are those after the noise was added."""
    solver = next(s for s in SOLVERS if s.name == name)
    problem = Problem(cond_scale=0.0)
    x, runs = problem.start(SIGMAS), []
    model = problem.guided(teacher_scale=0.0)
    for sample, denoiser in (
        (solver.sample, model),
        (
            getattr(needs.k_sampling, f"sample_{name.removesuffix('_cfg_pp')}"),
            CFGDenoiser(problem.student),
        ),
    ):
        torch.manual_seed(82)
        seen = []
        sample(
            denoiser,
            x,
            SIGMAS,
            problem.extra_args,
            lambda info, seen=seen: seen.append(copied(info)),
            True,
            s_churn=2.0,
        )
        runs.append(seen)
    for ours, known in zip(*runs, strict=True):
        assert relative(ours["x"], known["x"]) <= 1e-12
        assert float(ours["sigma_hat"]) == pytest.approx(float(known["sigma_hat"]), rel=1e-12)
        assert float(ours["sigma"]) == pytest.approx(float(known["sigma"]), rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@over_solvers
def test_a_guided_callback_shows_the_revision(solver, eta):
    """The student's estimate, the renoised one, the teacher's and the revised, at guided steps."""
    problem, scale = Problem(student=Counted(mixture(0))), 0.3
    guidance = {"teacher_scale": scale, "teacher_steps": 2, "renoise_eta": eta}
    seen = watched(solver, problem, SIGMAS, **guidance)
    tape = Tape(problem.start(SIGMAS), 6)
    for info in seen:
        if info["i"] >= 2:
            assert set(info) == THEIRS
            continue
        assert set(info) == THEIRS | OURS
        sigma_s = float(SIGMAS[info["i"] + 1])
        # The latest evaluation of the step is the one that is revised (in 2S the second one).
        call = problem.student.calls[sum(problems.counts(solver, SIGMAS)[: info["i"] + 1]) - 1]
        point, level = call.x[:2], float(call.sigma[0])
        student = problem.estimate(point, level)
        direction = problem.unconditional(point, level) if solver.cfg_pp else student
        noise = (1 - eta**2) ** 0.5 * (point - direction) / level
        if eta > 0:
            noise = noise + eta * tape()
        teacher = problem.teacher_estimate(info["renoised"], sigma_s)
        assert relative(info["denoised_student"], student) <= 1e-12
        assert relative(info["renoised"], student + sigma_s * noise) <= 1e-11
        assert relative(info["denoised_teacher"], teacher) <= 1e-12
        assert relative(info["denoised_revised"], student + scale * (teacher - student)) <= 1e-12


@over_solvers
def test_a_guided_callback_keeps_k_diffusions_keys(solver):
    """x, i, sigma, sigma_hat and denoised mean at a guided step what they mean at any other."""
    problem = Problem()
    plain = watched(solver, problem, SIGMAS, teacher_scale=0.0)
    guided = watched(solver, problem, SIGMAS, teacher_scale=0.5, teacher_steps=1)
    assert len(plain) == len(guided) == len(SIGMAS) - 1
    assert torch.equal(plain[0]["x"], guided[0]["x"])
    for one, other in zip(plain, guided, strict=True):
        assert one["i"] == other["i"]
        assert float(one["sigma"]) == float(other["sigma"])
        assert float(one["sigma_hat"]) == float(other["sigma_hat"])
    assert torch.equal(plain[0]["denoised"], guided[0]["denoised"])


@over_solvers
def test_a_callback_changes_nothing(solver):
    """With and without a callback the image is the same, bit for bit."""
    problem = Problem()
    x, guidance = problem.start(SIGMAS), {"teacher_steps": 2}
    expected = problem.sample(solver, x, SIGMAS, guidance)
    found = problem.sample(solver, x, SIGMAS, guidance, callback=lambda info: None)
    assert torch.equal(found, expected)


# ------------------------------------------------------------------------- signatures


def parameters(function):
    """Names and defaults of what can be given by position, in order."""
    known = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in known if p.kind is p.POSITIONAL_OR_KEYWORD]


def rest(solver, expected):
    """Parameters that a solver has beyond k-diffusion's; they come after those."""
    return parameters(solver.sample)[len(expected) :]


SAME_AS = {
    "dpmpp_2m_ancestral": getattr(needs.k_sampling, "sample_euler_ancestral", None),
    "lcm": lambda model, x, sigmas, extra_args=None, callback=None, disable=None,
    noise_sampler=None: None,
}  # fmt: skip


@needs.k_diffusion
@over_solvers
def test_signatures_are_k_diffusions(solver):
    """Names, order and defaults as k-diffusion has them; CFG++ as the solver without it."""
    plain = solver.name.replace("_cfg_pp", "")
    theirs = getattr(needs.k_sampling, f"sample_{plain}", None) or SAME_AS.get(plain)
    if theirs is None:
        pytest.skip("nothing to compare a new solver with")
    expected = parameters(theirs)
    assert parameters(solver.sample)[: len(expected)] == expected
    assert all(default is not inspect.Parameter.empty for _, default, _ in rest(solver, expected))


@over_solvers
def test_a_public_function_takes_the_solvers_options(solver):
    """Its options, with their defaults; a noise sampler where the solver draws noise."""
    common = {"model", "x", "sigmas", "extra_args", "callback", "disable", "noise_sampler"}
    common |= {"sigma_min", "sigma_max", "n"} if solver.own_levels else set()
    known = inspect.signature(solver.sample).parameters
    own = {name: p.default for name, p in known.items() if name not in common}
    assert own == {n: o.default for n, o in solver.options.items() if n not in common}
    assert ("noise_sampler" in known) == (solver.noise != "none")


@over_solvers
def test_solvers_and_public_functions_know_each_other(solver):
    """``sample_NAME_tg`` is public, documented, and finds its solver; so does the name."""
    name = f"sample_{solver.name}_tg"
    assert getattr(kdpp, name) is solver.sample
    assert name == solver.sample.__name__
    assert kdpp.SOLVERS[solver.name] is solver
    assert name in kdpp.__all__
    assert len(solver.sample.__doc__.split()) > 10
    for given in (solver, solver.name, name, solver.sample):
        assert solver_of(given) == (solver, {})
    assert solver_of(partial(solver.sample, disable=True)) == (solver, {"disable": True})


@over_solvers
def test_everything_can_be_given_by_position(solver):
    """Hosts pass extra_args, callback and disable by position."""
    problem, seen = Problem(), []
    x = problem.start(SIGMAS)
    torch.manual_seed(83)
    found = solver.sample(problem.guided(), x, SIGMAS, problem.extra_args, seen.append, True)
    torch.manual_seed(83)
    expected = run(solver, problem.guided(), x, SIGMAS, extra_args=problem.extra_args)
    assert torch.equal(found, expected)
    assert len(seen) == len(SIGMAS) - 1


@over_solvers
def test_the_progress_bar_can_be_disabled(solver, capsys):
    """tqdm's bar with disable=False, none with True (None: on a terminal, as in k-diffusion)."""
    problem = Problem()
    x = problem.start(SIGMAS)
    solver.sample(problem.guided(), x, SIGMAS, problem.extra_args, disable=True)
    assert not capsys.readouterr().err
    solver.sample(problem.guided(), x, SIGMAS, problem.extra_args, disable=False)
    assert "4/4" in capsys.readouterr().err
