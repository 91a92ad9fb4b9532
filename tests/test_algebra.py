"""Weighted sums of denoisers: their formula in every solver, their calls and kernels, handover."""

import math
import re
from pathlib import Path

import pytest
import torch

import kdpp
import needs
import problems
from kdpp import (
    NoiseRange,
    Teacher,
    TeacherGuidedDenoiser,
    Weighted,
    WeightedSum,
    autoguidance,
    handover,
    two_model_cfg,
)
from problems import (
    SHAPE,
    Counted,
    NeverCalled,
    Problem,
    conditions,
    gaussian,
    karras,
    log_uniform,
    mixture,
    relative,
    run,
    seeded,
)
from test_calls import nets
from test_cost import Ledger
from test_guidance import Noise

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
EULER, TWO_M = kdpp.SOLVERS["euler"], kdpp.SOLVERS["dpmpp_2m"]
SIGMAS = torch.tensor([10.0, 4.0, 1.5, 0.6, 0.2, 0.0], dtype=torch.float64)
STEPS = len(SIGMAS) - 1
ONE, TWO, THREE = mixture(0), mixture(1), mixture(2)
PROBLEM = Problem()
OWN = seeded(2, SHAPE[0], seed=73)
"""A condition of a part's own."""


class Flow(torch.nn.Module):
    """A VE denoiser in a flow model's coordinates, finite at τ = 1 for what it is used for."""

    flow = True

    def __init__(self, model):
        super().__init__()
        self.model = kdpp.as_flow(model, sigma_max=1e3)

    def forward(self, x, sigma, **extra_args):
        """The inner one's answer."""
        return self.model(x, sigma, **extra_args)


def sample(solver, student, sigmas=SIGMAS, teacher=None, settings=None, **options):
    """One run with the problem's conditions, guided if there is a teacher."""
    x = PROBLEM.start(sigmas)
    settings = {"renoise_noise_sampler": Noise(x.shape), **(settings or {})}
    model = TeacherGuidedDenoiser(student, teacher, **settings)
    options = {"noise_sampler": Noise(x.shape, seed=5), **options}
    return run(solver, model, x, sigmas, **{"extra_args": PROBLEM.extra_args, **options})


def same(found, expected, bound=1e-11):
    """Whether two images agree but for some roundings."""
    return relative(found, expected) <= bound


def guided_estimate(model, x, sigma, cond, uncond, scale):
    """CFG written out, and the unconditional estimate."""
    without, with_it = model(x, sigma, cond=uncond), model(x, sigma, cond=cond)
    return without + scale * (with_it - without), without


def by_hand(*parts, flow=False):
    """Σ w_i D_i as a host's own model: parts are (denoiser, w(σ), CFG scale or None, cond or None).

    It does all CFG itself, and tells the unconditional estimate.
    """

    def ask(x, sigma, cfg_scale, cond=None, uncond=None):
        estimate = rest = 0.0
        for model, weight, scale, own in parts:
            weight = weight(float(sigma[0])) if callable(weight) else weight
            scale = (1.0 if cfg_scale is None else cfg_scale) if scale is None else scale
            answer = guided_estimate(model, x, sigma, cond if own is None else own, uncond, scale)
            estimate, rest = estimate + weight * answer[0], rest + weight * answer[1]
        return estimate, rest

    return kdpp.HostModel(ask, flow=flow)


# ------------------------------------------------------------------------- the formula


@over_solvers
def test_a_sum_in_every_solver(solver):
    """Three networks, each with its condition and CFG: the run of the sum written out."""
    summed = WeightedSum(
        Weighted(ONE, 1.7, cfg_scale=1.0),
        Weighted(TWO, -0.4),
        Weighted(THREE, cfg_scale=4.0, extra_args={"cond": OWN}),
    )
    expected = by_hand((ONE, 1.7, 1.0, None), (TWO, -0.4, None, None), (THREE, -0.3, 4.0, OWN))
    assert same(sample(solver, summed), sample(solver, expected))
    assert not same(sample(solver, summed), sample(solver, ONE), 1e-3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@over_solvers
def test_a_sum_as_a_teacher(solver, scale):
    """It is asked at x_s with the teacher's CFG scale; the student stays what it is."""
    summed = WeightedSum(Weighted(TWO, 0.6), Weighted(THREE, 0.4, cfg_scale=2.0))
    expected = by_hand((TWO, 0.6, None, None), (THREE, 0.4, 2.0, None))
    settings = {"teacher_steps": 3, "teacher_scale": 0.5, "teacher_cfg_scale": scale}
    found = sample(solver, ONE, teacher=summed, settings=settings)
    assert same(found, sample(solver, ONE, teacher=expected, settings=settings))


@over_solvers
def test_weights_by_level_in_every_solver(solver):
    """Every evaluation has those of its own level, inside a step too."""

    def weight(sigma):
        return 0.2 + 1.0 / (1.0 + sigma)

    expected = by_hand((ONE, lambda s: 1.0 - weight(s), None, None), (TWO, weight, None, None))
    found = sample(solver, WeightedSum(ONE, Weighted(TWO, weight)))
    assert same(found, sample(solver, expected))


WEIGHTS = {
    "a number": (0.3, lambda i, sigma: 0.3),
    "by step": ([0.0, 0.5, -1.0, 2.0, 0.25], lambda i, sigma: [0.0, 0.5, -1.0, 2.0, 0.25][i]),
    "by level": (lambda sigma: 1.0 / (1.0 + sigma), lambda i, sigma: 1.0 / (1.0 + sigma)),
}


@pytest.mark.parametrize(("weight", "says"), WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("flow", [False, True])
def test_every_form_of_weight(weight, says, flow):
    """Euler written out, with each step's own weights; the level is as the model writes it."""
    kind = Flow if flow else (lambda model: model)
    sigmas = torch.tensor([0.95, 0.7, 0.5, 0.3, 0.1, 0.0], dtype=torch.float64) if flow else SIGMAS
    cond, uncond = conditions(2)
    x = expected = PROBLEM.start(sigmas)
    one, two = kind(ONE), kind(TWO)
    for i, (sigma, sigma_next) in enumerate(problems.pairs(sigmas)):
        level, w = x.new_full((2,), sigma), says(i, sigma)
        d = (1 - w) * guided_estimate(one, expected, level, cond, uncond, 2.5)[0]
        d = d + w * guided_estimate(two, expected, level, cond, uncond, 2.5)[0]
        expected = d + (expected - d) / sigma * sigma_next
    found = sample(EULER, WeightedSum(one, Weighted(two, weight)), sigmas)
    assert same(found, expected)


def test_the_named_uses_are_their_formulas():
    """D_worse + w (D - D_worse), and D_u(∅) + w (D_c(cond) - D_u(∅)), by number, list, function."""
    x, sigma = PROBLEM.start(SIGMAS), torch.full((2,), 3.0, dtype=torch.float64)
    cond, uncond = conditions(2)
    extra = {"cond": cond, "uncond": uncond}
    for w in (2.5, lambda level: level / 1.2):
        worse, better = TWO(x, sigma, cond), ONE(x, sigma, cond)
        found = autoguidance(ONE, TWO, w)(x, sigma, **extra)
        assert same(found, worse + 2.5 * (better - worse))
        without = TWO(x, sigma, uncond)
        found = two_model_cfg(ONE, TWO, w)(x, sigma, cond_scale=9.0, **extra)
        assert same(found, without + 2.5 * (better - without))
    lists = [[w, 1.0, 1.0, 1.0, 1.0] for w in (1.0, 3.0)]
    one, three = (sample(EULER, autoguidance(ONE, TWO, w), SIGMAS) for w in lists)
    assert torch.equal(one, sample(EULER, ONE)) and not same(one, three, 1e-3)
    first = sample(EULER, autoguidance(ONE, TWO, 3.0, steps=1))
    assert same(first, three)


def test_gaussians_that_differ_in_their_mean_sum_to_a_gaussian():
    """Autoguidance with an exact solution: the ODE of the mean μ_0 + w (μ_1 - μ_0), solved."""
    good, bad = gaussian(0), gaussian(0)
    bad.mean = bad.mean + seeded(*SHAPE, seed=99)
    levels = log_uniform(256)
    x = PROBLEM.start(levels)
    model = TeacherGuidedDenoiser(autoguidance(good, bad, 1.8))
    found = run(TWO_M, model, x, levels, extra_args={})
    exact = gaussian(0)
    exact.mean = bad.mean + 1.8 * (good.mean - bad.mean)
    solution = exact.solution(x, float(levels[0]), float(levels[-1]))
    assert relative(found, solution) < 3e-4
    assert relative(found, good.solution(x, float(levels[0]), float(levels[-1]))) > 1e-2


def test_a_sum_of_sums():
    """Weights multiply; what is said of an inner network goes before what is said of the sum."""
    inner = WeightedSum(Weighted(ONE, 2.0, cfg_scale=3.0), TWO)
    outer = WeightedSum(Weighted(inner, 0.5, cfg_scale=1.0), Weighted(THREE, 0.5))
    expected = by_hand((ONE, 1.0, 3.0, None), (TWO, -0.5, 1.0, None), (THREE, 0.5, None, None))
    assert same(sample(TWO_M, outer), sample(TWO_M, expected))
    first = handover(inner, THREE, steps=1)
    assert same(
        sample(EULER, first),
        sample(EULER, by_hand((ONE, lambda s: 2.0 * (s < 10), 3.0, None),
                              (TWO, lambda s: -1.0 * (s < 10), None, None),
                              (THREE, lambda s: 1.0 * (s == 10), None, None))),
    )  # fmt: skip


def test_a_batch_in_parts_and_conditions_by_row():
    """Every sample has its own condition; alone it is what it is in the batch."""
    summed = WeightedSum(Weighted(ONE, 0.7), Weighted(TWO, extra_args={"cond": OWN}))
    whole = sample(EULER, summed)
    cond, uncond = conditions(2)
    for row in range(2):
        part = slice(row, row + 1)
        alone = WeightedSum(Weighted(ONE, 0.7), Weighted(TWO, extra_args={"cond": OWN[part]}))
        extra = {"cond": cond[part], "uncond": uncond[part], "cond_scale": 2.5}
        x = PROBLEM.start(SIGMAS)[part]
        found = run(EULER, TeacherGuidedDenoiser(alone), x, SIGMAS, extra_args=extra)
        assert same(found, whole[part])


@over_solvers
def test_distillation_with_a_sum(solver):
    """A handed-over student is revised as any other; the mix may be one of the caller's."""

    def combine(denoised, estimates, scales):
        return denoised + scales[0] * (estimates[0] - denoised).tanh()

    expected = by_hand((ONE, lambda s: float(s < 9.9), None, None),
                       (TWO, lambda s: float(s >= 9.9), None, None))  # fmt: skip
    if solver.evaluations > 1 or solver.extra or solver.multistep:
        return  # steps with a point between, and memories that start anew: tested below
    for settings in ({}, {"combine": combine}):
        settings = {"teacher_steps": 2, "teacher_scale": 0.4, "teacher_cfg_scale": 2.0, **settings}
        found = sample(solver, handover(ONE, TWO), teacher=THREE, settings=settings)
        assert same(found, sample(solver, expected, teacher=THREE, settings=settings))


# ------------------------------------------------------------------------- handover


@pytest.mark.parametrize("k", [1, 3])
@over_solvers
def test_handover_is_a_run_of_the_teacher_and_one_of_the_student(solver, k):
    """Also for multistep solvers, whose memory starts anew with the other network."""
    whole, part = (solver.plan(levels.tolist()) for levels in (SIGMAS, SIGMAS[: k + 1]))
    if [step.stages for step in whole[:k]] != [step.stages for step in part]:
        pytest.skip("its steps depend on where the run ends")
    middle = None

    def keep(info):
        nonlocal middle
        if info["i"] == k:
            middle = info["x"].clone()

    found = sample(solver, handover(ONE, TWO, steps=k), callback=keep)
    x = PROBLEM.start(SIGMAS)
    options = {"noise_sampler": Noise(x.shape, seed=5), "extra_args": PROBLEM.extra_args}
    first = run(solver, TeacherGuidedDenoiser(TWO), x, SIGMAS[: k + 1], **options)
    assert same(first, middle)
    last = run(solver, TeacherGuidedDenoiser(ONE), first, SIGMAS[k:], **options)
    assert same(found, last)


STEPS_OF = {
    "the first": (1, {0}),
    "none": (0, set()),
    "all": (9, set(range(STEPS))),
    "the last": ({-1}, {STEPS - 1}),
    "some": ([1, -2], {1, 3}),
    "a range": (NoiseRange(0.5, 4.0), {1, 2, 3}),
}


@pytest.mark.parametrize(("steps", "taken"), STEPS_OF.values(), ids=STEPS_OF)
@over_solvers
def test_handover_costs_no_call(solver, steps, taken):
    """In the teacher's steps it alone is asked, in the others the student: as many as by one."""
    plain, one, two = Counted(ONE), Counted(ONE), Counted(TWO)
    sample(solver, plain)
    sample(solver, handover(one, two, steps, cfg_scale=1.0 if not solver.cfg_pp else None))
    listed = handover(ONE, TWO, taken)
    assert torch.equal(sample(solver, handover(ONE, TWO, steps)), sample(solver, listed))
    starts = {float(SIGMAS[i]) for i in taken}
    assert {float(call.sigma[0]) for call in two.calls} >= starts
    others = {float(SIGMAS[i]) for i in set(range(STEPS)) - taken}
    assert {float(call.sigma[0]) for call in one.calls} >= others
    if not solver.extra:
        assert len(one.calls) + len(two.calls) == len(plain.calls)
    if solver.evaluations == 1 and not solver.extra:
        assert [len(one.calls), len(two.calls)] == [STEPS - len(taken), len(taken)]
        rows = {len(call.x) for call in two.calls}
        assert rows <= ({4} if solver.cfg_pp else {2})


def composite_error(steps, solver):
    """A 2nd-order run through a handover at σ = 1 against the exact solution in two pieces."""
    one, two = gaussian(0), gaussian(1)
    high, low = log_uniform(steps, 1.0, 10.0), log_uniform(steps, 0.2, 1.0)
    levels = torch.cat([high[:-1], low])
    x = seeded(2, *SHAPE, seed=9) * 10.0
    model = TeacherGuidedDenoiser(handover(one, two, steps=steps))
    found = run(solver, model, x, levels, extra_args={})
    return relative(found, one.solution(two.solution(x, 10.0, 1.0), 1.0, 0.2))


@pytest.mark.parametrize("name", ["dpmpp_2m", "res_multistep", "lms", "unipc", "deis"])
def test_a_handover_keeps_the_order(name, monkeypatch):
    """Order 2 through the switch; with estimates of both models in one difference it is 1."""
    solver = kdpp.SOLVERS[name]
    errors = [composite_error(steps, solver) for steps in (128, 256)]
    assert errors[0] / errors[1] > 3.0
    monkeypatch.setattr(kdpp.driver, "switches", lambda shares, steps: [])
    mixed = [composite_error(steps, solver) for steps in (128, 256)]
    assert mixed[0] / mixed[1] < 2.6
    assert mixed[1] > 3.0 * errors[1]


def test_the_steps_before_a_switch_are_those_of_the_whole_run():
    """A plan is made anew from the switch on; a solver without a memory is not planned again."""
    planned = []

    class Spy(kdpp.Solver):
        def plan(self, sigmas, **options):
            planned.append(len(list(sigmas)))
            return super().plan(sigmas, **options)

    for solver, counts in ((TWO_M, [6, 4, 2]), (EULER, [6]), (kdpp.SOLVERS["heun"], [6])):
        planned.clear()
        fields = {name: getattr(solver, name) for name in solver.__dataclass_fields__}
        spy = Spy(**fields)
        _ = spy.multistep
        planned.clear()
        model = TeacherGuidedDenoiser(handover(ONE, TWO, steps={2, 3}))
        kdpp.driver.plan_run(spy, model, PROBLEM.start(SIGMAS), SIGMAS, None, {})
        assert planned == counts


@pytest.mark.parametrize("switch", [1, 3])
def test_handover_is_the_mixed_rollouts_switch(switch):
    """DDIM whose first transitions the teacher takes in one step each."""
    rollout = kdpp.mixed_rollout(
        ONE, TWO, PROBLEM.start(SIGMAS), SIGMAS, teacher_substeps=1, switch=switch, disable=True,
        extra_args=PROBLEM.extra_args, teacher_cfg_scale=3.0,
    )  # fmt: skip
    found = sample(EULER, handover(ONE, TWO, steps=switch, cfg_scale=3.0))
    assert same(found, rollout.x, 1e-13)


@pytest.mark.parametrize("solver", [EULER, TWO_M], ids=lambda s: s.name)
def test_steps_of_no_length_are_not_counted(solver):
    """The first k are k that move; who is asked in between changes nothing."""
    levels = torch.tensor([10.0, 10.0, 4.0, 4.0, 1.5, 0.0], dtype=torch.float64)
    plain = torch.tensor([10.0, 4.0, 1.5, 0.0], dtype=torch.float64)
    found = sample(solver, handover(ONE, TWO, steps=2), levels)
    assert same(found, sample(solver, handover(ONE, TWO, steps=2), plain))


# ------------------------------------------------------------------------- calls and kernels


def test_one_network_is_asked_once():
    """All its parts and halves of CFG at one point: one call of as many rows as they take."""
    one, two = Counted(ONE), Counted(TWO)
    summed = WeightedSum(
        Weighted(one, 1.5, cfg_scale=1.0),
        Weighted(two, 0.5),
        Weighted(one, cfg_scale=3.0, extra_args={"cond": OWN}),
        Weighted(two, 0.25, cfg_scale=0.0),
    )
    sample(EULER, summed)
    assert [len(call.x) for call in one.calls] == [6] * STEPS
    assert [len(call.x) for call in two.calls] == [6] * STEPS
    expected = by_hand((ONE, 1.5, 1.0, None), (TWO, 0.5, None, None),
                       (ONE, -1.25, 3.0, OWN), (TWO, 0.25, 0.0, None))  # fmt: skip
    assert same(sample(EULER, summed), sample(EULER, expected))


def test_teacher_and_its_parts_share_a_call():
    """Two teachers, one of them a sum that holds the other's network: one call of that network."""
    two = Counted(TWO)
    teachers = [
        Teacher(two, 0.2, cfg_scale=1.0),
        Teacher(WeightedSum(Weighted(two, 0.4), THREE), 0.3, cfg_scale=2.0),
    ]
    sample(EULER, ONE, teacher=teachers)
    assert [len(call.x) for call in two.calls] == [2 + 4]


def test_a_stack_in_a_sum_is_one_call(monkeypatch):
    """Networks of one architecture, stacked: their sum is one call of batched kernels."""
    originals = nets()
    stacked = kdpp.stack_teachers(*originals)
    calls = []
    forward = kdpp.stacking.Stack.forward
    monkeypatch.setattr(
        kdpp.stacking.Stack, "forward",
        lambda self, x, *a, **k: calls.append(len(x)) or forward(self, x, *a, **k),
    )  # fmt: skip
    weights = (0.5, 0.8, -0.3)
    found = sample(EULER, WeightedSum(*map(Weighted, stacked, weights)))
    assert calls == [3 * 4] * STEPS
    expected = by_hand(*((net, w, None, None) for net, w in zip(originals, weights)))
    assert same(found, sample(EULER, expected), 1e-9)


def cheap(ledger, factor):
    return ledger.outside(lambda x, sigma, cond=None: factor * x)


def kernels_of(student, ledger, solver=EULER, **settings):
    """The latent-sized kernels of a run in float32 without CFG, networks left out."""
    sigmas = karras(6)
    x = seeded(2, 3, 5, 7, seed=1, dtype=torch.float32) * 10
    noise = ledger.outside(lambda *_: torch.zeros_like(x))
    model = TeacherGuidedDenoiser(student, renoise_noise_sampler=noise, **settings)
    look = kdpp.driver.check_start  # reads a latent on the CPU, before the loop
    kdpp.driver.check_start = ledger.outside(look)
    try:
        with ledger:
            extra = {"cond": torch.zeros(2, 3)}
            run(solver, model, x, sigmas, extra_args=extra, noise_sampler=noise)
    finally:
        kdpp.driver.check_start = look
    assert not ledger.scalars
    return len(ledger.kernels)


@over_solvers
def test_two_networks_are_one_kernel_more(solver):
    """One interpolation an evaluation, and none where one network alone is asked; no host read."""
    if solver.cfg_pp:
        pytest.skip("needs both halves of CFG")
    ledgers = [Ledger() for _ in range(4)]
    nets = [[cheap(ledger, factor) for factor in (0.3, 0.2)] for ledger in ledgers]
    plain = kernels_of(nets[0][0], ledgers[0], solver)
    falling = WeightedSum(nets[1][0], Weighted(nets[1][1], lambda sigma: sigma / 20.0))
    summed = kernels_of(falling, ledgers[1], solver)
    evaluations = sum(len(step.stages) for step in solver.plan(karras(6).tolist()))
    assert summed - plain == evaluations
    taken = kernels_of(handover(*nets[2], steps=6), ledgers[2], solver)
    assert taken == plain
    guided = autoguidance(*nets[3], 2.0, steps=NoiseRange(0.5, 5.0))
    segment = kernels_of(guided, ledgers[3], solver)
    assert plain < segment < summed  # the memory goes on


def test_two_networks_with_cfg_are_three_kernels():
    """Each one's CFG, and one for both: beside what joins the halves before a call."""
    ledger, other = Ledger(), Ledger()
    for ledger_, count in ((ledger, 1), (other, 2)):
        nets = [cheap(ledger_, factor) for factor in (0.3, 0.2)][:count]
        student = nets[0] if count == 1 else WeightedSum(Weighted(nets[0], 0.4), nets[1])
        x = seeded(2, 3, 5, 7, seed=1, dtype=torch.float32) * 10
        extra = {"cond": torch.zeros(2, 3), "uncond": torch.zeros(2, 3), "cond_scale": 2.0}
        with ledger_:
            run(EULER, TeacherGuidedDenoiser(student), x, karras(4), extra_args=extra)
    # The halves of x are joined for each network, its CFG is a lerp, the sum another.
    assert len(other.kernels) - len(ledger.kernels) == 4 * (1 + 1 + 1)


def test_a_latent_without_numbers():
    """On the meta device every read would raise: weights by σ are numbers before the loop."""
    x = torch.empty(2, 3, 5, 7, device="meta")
    nets = [lambda x, sigma, cond=None: x * sigma[:, None, None, None] for _ in range(2)]
    summed = WeightedSum(nets[0], Weighted(nets[1], lambda s: s / 20, steps=NoiseRange(0.1, 5.0)))
    model = TeacherGuidedDenoiser(summed, handover(*nets), teacher_cfg_scale=1.0,
                                  renoise_noise_sampler=lambda *_: torch.empty_like(x))  # fmt: skip
    found = run(TWO_M, model, x, karras(6), extra_args={"cond": torch.empty(2, 3, device="meta")})
    assert found.shape == x.shape


# ------------------------------------------------------------------------- every kind of denoiser


def test_hosts_models_and_own_cfg():
    """They do their own CFG, each at its own scale; CFG++ gets the sum of their unconditionals."""
    scales = []

    def host(model):
        def ask(x, sigma, cfg_scale, cond=None, uncond=None):
            scales.append(cfg_scale)
            return guided_estimate(model, x, sigma, cond, uncond, cfg_scale)

        return kdpp.HostModel(ask, flow=False)

    summed = WeightedSum(Weighted(host(ONE), 1.6, cfg_scale=3.0), host(TWO))
    expected = by_hand((ONE, 1.6, 3.0, None), (TWO, -0.6, None, None))
    for name in ("euler", "dpmpp_2m_cfg_pp"):
        solver = kdpp.SOLVERS[name]
        assert same(sample(solver, summed), sample(solver, expected))
    assert set(scales) == {3.0, 2.5}
    bare = WeightedSum(Weighted(kdpp.OwnCFG(NeverCalled()), 0.5), ONE)
    with pytest.raises(ValueError, match=r"estimate, and kdpp\.OwnCFG was given none"):
        sample(kdpp.SOLVERS["euler_cfg_pp"], bare)


class Lent(kdpp.Borrowed):
    """A borrowed denoiser that notes when it comes, is asked and goes."""

    def __init__(self, name, log, model):
        super().__init__(lambda: log.append(f"{name} comes") or noting(name, log, model), like=ONE)
        self.name, self.log = name, log

    def release(self):
        if self._here:
            self.log.append(f"{self.name} goes")
        super().release()


def noting(name, log, model):
    def ask(x, sigma, **extra_args):
        log.append(name)
        return model(x, sigma, **extra_args)

    return ask


def test_a_borrowed_network_is_here_for_its_steps():
    """From the first step that asks it, in the student's place or as a teacher, to the last."""
    log = []
    lent = Lent("ψ", log, TWO)
    student = handover(noting("θ", log, ONE), lent, steps={1}, cfg_scale=1.0)
    sample(EULER, student)
    assert log == ["θ", "ψ comes", "ψ", "ψ goes", "θ", "θ", "θ"]
    log.clear()
    settings = {"teacher_steps": {2}, "teacher_cfg_scale": 1.0}
    sample(EULER, student, teacher=lent, settings=settings)
    assert log == ["θ", "ψ comes", "ψ", "θ", "ψ", "ψ goes", "θ", "θ"]
    log.clear()
    broken = handover(lent, noting("θ", log, lambda x, sigma, **extra: x[:1]), steps={1})
    with pytest.raises(ValueError, match="returned shape"):
        sample(EULER, broken)
    assert log[-1] == "ψ goes"


def test_a_lora_and_its_base():
    """Autoguidance of a student by its own base: two calls of one network, adapters on and off."""
    peft = pytest.importorskip("peft", reason="needs peft (extra: diffusers)")

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(12, 12).double()

        def forward(self, x, sigma, cond=None):
            """All pixels, mixed."""
            return self.layer(x.flatten(1)).view_as(x) / (1 + sigma.view(-1, 1, 1, 1))

    base, student = Linear(), Linear()
    config = peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    student = peft.inject_adapter_in_model(config, student).double()
    summed = autoguidance(student, kdpp.without_adapters(student), 2.0)
    expected = by_hand((student, 2.0, 1.0, None), (base, -1.0, 1.0, None))
    extra = {"cond": conditions(2)[0], "uncond": conditions(2)[1]}
    found = sample(EULER, summed, extra_args=extra)
    assert same(found, sample(EULER, expected, extra_args=extra))


def test_networks_that_share_their_memory():
    """One buffer for all answers: the right image, or a refusal, and never the wrong one."""

    def into(model, buffer):
        return lambda x, sigma, cond=None: buffer.copy_(model(x, sigma, cond))

    def summing():
        buffer = torch.empty(2, *SHAPE, dtype=torch.float64)
        return WeightedSum(Weighted(into(ONE, buffer), 0.5), into(TWO, buffer))

    extra, summed = {"cond": conditions(2)[0]}, summing()
    with pytest.raises(ValueError, match="into memory that holds an earlier one"):
        sample(EULER, summed, extra_args=extra)
    expected = WeightedSum(Weighted(ONE, 0.5), TWO)
    with torch.inference_mode():
        found = sample(EULER, summing(), extra_args=extra)
    assert same(found, sample(EULER, expected, extra_args=extra))


def test_inpainting_a_sum():
    """Every part sees the known region; the sum is the inpainted sum."""
    image, noise = seeded(2, *SHAPE, seed=4), seeded(2, *SHAPE, seed=5)
    mask = torch.tensor([[0.0, 1.0], [0.5, 1.0]])
    summed = WeightedSum(Weighted(ONE, 0.3, steps=3), TWO)
    model = TeacherGuidedDenoiser(summed, THREE, teacher_cfg_scale=1.0)
    written = TeacherGuidedDenoiser(
        by_hand((ONE, lambda s: 0.3 * (s > 1), None, None),
                (TWO, lambda s: 1 - 0.3 * (s > 1), None, None)),
        THREE, teacher_cfg_scale=1.0,
    )  # fmt: skip
    found = []
    for one in (model, written):
        known = kdpp.inpaint(one, image, mask, noise)
        known.renoise_noise_sampler = Noise(image.shape)
        found.append(run(EULER, known, PROBLEM.start(SIGMAS), SIGMAS,
                         extra_args=PROBLEM.extra_args))  # fmt: skip
    assert same(*found)
    assert torch.equal(found[0][..., 0, 0], image[..., 0, 0])
    bare = kdpp.inpaint(autoguidance(ONE, TWO, 2.0), image, mask, noise)
    assert isinstance(bare, WeightedSum)
    assert all(part.denoiser.inner_model in (ONE, TWO) for part in bare.parts)


def test_trained_ranges():
    """The levels that all parts know; a teacher is clamped to them; none in common is refused."""

    def known(model, low, high):
        network = Counted(model)
        network.sigma_min, network.sigma_max = low, high
        return network

    one, two = known(ONE, 0.1, 20.0), known(TWO, 0.5, 3.0)
    summed = WeightedSum(Weighted(one, 0.5), two)
    assert (summed.sigma_min, summed.sigma_max) == (0.5, 3.0)
    with pytest.warns(UserWarning, match="trained range"):
        sample(EULER, ONE, teacher=summed)
    assert {float(call.sigma[0]) for call in one.calls} == {3.0}
    # A part for some steps says nothing of the others.
    assert handover(one, two).sigma_max == 20.0
    with pytest.raises(ValueError, match=r"do not share: \[0\.1, 20\], \[30, 40\]"):
        WeightedSum(Weighted(one, 0.5), known(TWO, 30.0, 40.0))


def test_foreign_samplers_take_a_sum():
    """k-diffusion's own loop, and encode; weights by σ read it, those by step are refused."""
    k_diffusion = needs.k_sampling
    weights = (0.3, lambda sigma: sigma / 20.0)
    for weight in weights:
        summed = WeightedSum(ONE, Weighted(TWO, weight, steps=NoiseRange(0.5, 20.0)))
        expected = sample(EULER, summed)
        if k_diffusion is not None:
            found = k_diffusion.sample_euler(
                summed, PROBLEM.start(SIGMAS), SIGMAS, PROBLEM.extra_args, disable=True
            )
            assert same(found, expected)
        rising = SIGMAS[:-1].flip(0)
        image = seeded(2, *SHAPE, seed=4)
        up = kdpp.encode(summed, image, rising, PROBLEM.extra_args, disable=True)
        x = image
        for sigma, sigma_next in problems.pairs(rising):
            d = summed(x, x.new_full((2,), sigma), **PROBLEM.extra_args)
            x = d + (x - d) / sigma * sigma_next
        assert same(up, x)
    by_step = (handover(ONE, TWO), WeightedSum(ONE, Weighted(TWO, [0.1] * 5)))
    for summed in by_step:
        with pytest.raises(ValueError, match="outside of kdpp's samplers"):
            summed(PROBLEM.start(SIGMAS), torch.ones(2), cond=conditions(2)[0])
    summed = WeightedSum(ONE, Weighted(TWO, weights[1]))
    with pytest.raises(ValueError, match="depend on σ, and a batch at"):
        summed(PROBLEM.start(SIGMAS), torch.tensor([1.0, 2.0]), cond=conditions(2)[0])


def test_a_student_needs_no_teacher():
    """TeacherGuidedDenoiser(student): the run without a guided step, to the bit."""
    expected = sample(TWO_M, ONE, teacher=TWO, settings={"teacher_steps": 0})
    assert torch.equal(sample(TWO_M, ONE), expected)


def test_a_captured_run_of_a_sum():
    """As one compiled function: the same image; a network that comes and goes is refused."""
    x, extra = PROBLEM.start(SIGMAS), PROBLEM.extra_args
    model = TeacherGuidedDenoiser(handover(ONE, TWO))
    captured = kdpp.capture("euler", model, x, SIGMAS, extra)
    assert same(captured(x), run(EULER, model, x, SIGMAS, extra_args=extra))
    lent = TeacherGuidedDenoiser(handover(ONE, Lent("ψ", [], TWO)))
    with pytest.raises(ValueError, match="comes and goes"):
        kdpp.capture("euler", lent, x, SIGMAS, extra)


# ------------------------------------------------------------------------- what is refused

NEVER = NeverCalled()
FLOWING = kdpp.FlowDenoiser(NEVER)
MADE = {
    "one part": (lambda: WeightedSum(Weighted(ONE, 1.0)), ValueError, "give two or more"),
    "no denoiser": (lambda: WeightedSum(ONE, 3), TypeError, "must be a denoiser"),
    "two rests": (lambda: WeightedSum(ONE, TWO), ValueError, "several parts have no weight"),
    "not one": (
        lambda: WeightedSum(Weighted(ONE, 0.5), Weighted(TWO, 0.6)),
        ValueError, r"0\.5, 0\.6, which sum to 1\.1",
    ),
    "nan": (lambda: Weighted(ONE, math.nan), ValueError, "weight is nan"),
    "a word": (lambda: Weighted(ONE, "much"), ValueError, "weight is 'much'"),
    "a list of words": (lambda: Weighted(ONE, ["a"]), ValueError, "weight is 'a'"),
    "half a step": (lambda: Weighted(ONE, 1.0, steps=0.5), ValueError, "steps is 0.5"),
    "an empty range": (
        lambda: Weighted(ONE, 1.0, steps=NoiseRange(2, 1)), ValueError, "0 ≤ low ≤ high",
    ),
    "a rest in some steps": (lambda: Weighted(ONE, steps=1), ValueError, "leave steps out"),
    "a CFG scale": (lambda: Weighted(ONE, cfg_scale=math.inf), ValueError, "cfg_scale is inf"),
    "extra_args": (lambda: Weighted(ONE, extra_args=[1]), TypeError, "must be a dict"),
    "cond_scale": (
        lambda: Weighted(ONE, extra_args={"cond_scale": 2.0}), ValueError, "is its cfg_scale",
    ),
    "kinds": (lambda: handover(ONE, FLOWING), ValueError, "all be flow models or all not"),
    "kinds of a teacher": (
        lambda: TeacherGuidedDenoiser(autoguidance(FLOWING, FLOWING, 2.0), ONE),
        ValueError, "both be flow models or both not",
    ),
    "unmarked CFG": (
        lambda: handover(ONE, problems.CFGDenoiser(ONE)), TypeError, "seems to do its own CFG",
    ),
    "wrapped": (
        lambda: kdpp.as_ve(autoguidance(FLOWING, FLOWING, 2.0)), TypeError, "wrap the denoisers",
    ),
    "stacked": (
        lambda: kdpp.stack_teachers(*(autoguidance(ONE, TWO, 2.0) for _ in range(2))),
        TypeError, "stack its networks",
    ),
    "a scale": (lambda: autoguidance(ONE, TWO, None), ValueError, "scale is None"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "says"), MADE.values(), ids=MADE)
def test_what_cannot_be_made(make, error, says):
    """Refused when it is made: what was given, and what is allowed."""
    with pytest.raises(error, match=says):
        make()


RUN = {
    "not one at a step": (
        [Weighted(NEVER, [0.5] * STEPS), Weighted(NEVER, [0.5] * 3 + [0.6, 0.5])],
        r"at step 3, which sum to 1\.1",
    ),
    "not one at a level": (
        [Weighted(NEVER, lambda s: s), Weighted(NEVER, 0.0)], r"at step 0, which sum to 10",
    ),
    "not a number at a level": ([NEVER, Weighted(NEVER, lambda s: None)], "the weight is None"),
    "none in some steps": (
        [Weighted(NEVER, 1.0, steps=2), Weighted(NEVER, 0.0)], "at step 2, which sum to 0",
    ),
    "a list": ([NEVER, Weighted(NEVER, [0.5] * 4)], "weight holds 4 numbers for 5 steps"),
    "a step": ([NEVER, Weighted(NEVER, 0.5, steps={5})], "steps holds 5; the schedule has 5"),
    "a range without a step": (
        [NEVER, Weighted(NEVER, 0.5, steps=NoiseRange(20, 30))], "nothing is asked in that range",
    ),
    "inside": (
        [NEVER, Weighted(handover(NEVER, NEVER, NoiseRange(20, 30)), 0.5)],
        "nothing is asked in that range",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "says"), RUN.values(), ids=RUN)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_what_cannot_be_run(parts, says, role):
    """What does not fit the schedule is refused before any network is called."""
    summed = WeightedSum(*parts)
    student, teacher = (summed, None) if role == "student" else (NEVER, summed)
    settings = {"teacher_steps": STEPS, "renoise": lambda i, s, s_next: s}
    if role == "student":
        settings = {}
    with pytest.raises(ValueError, match=says):
        sample(EULER, student, teacher=teacher, settings=settings)


def test_conditions_that_are_missing():
    """A part's CFG needs both halves; an error before any call."""
    extra = {"cond": conditions(2)[0]}
    with pytest.raises(ValueError, match=r"cfg_scale=2\.0.*given: \['cond'\]"):
        sample(EULER, WeightedSum(NEVER, Weighted(NEVER, 0.5, cfg_scale=2.0)), extra_args=extra)
    with pytest.raises(ValueError, match=r"cfg_scale=0\.0"):
        sample(EULER, two_model_cfg(NEVER, NEVER, 3.0), extra_args=extra)


def test_parts_of_other_latent_shapes():
    """A network that answers another shape is named at the call that shows it."""
    small = kdpp.SOLVERS["euler"]
    with pytest.raises(ValueError, match=r"the student returned shape \(2, 3, 1, 1\)"):
        extra = {"cond": conditions(2)[0]}
        other = Weighted(lambda x, sigma, cond=None: x[..., :1, :1], 0.5)
        sample(small, WeightedSum(ONE, other), extra_args=extra)


# ------------------------------------------------------------------------- the docs


def test_the_page_runs_as_it_stands():
    """Every example of docs/two_models.md, one after the other, as a reader would type them."""
    page = Path(__file__).parents[1] / "docs" / "two_models.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert len(examples) >= 6
    variables = {"__name__": "page"}
    for example in examples:
        exec(compile(example, page.name, "exec"), variables)
