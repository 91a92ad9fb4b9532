"""What a run costs beside its networks: host reads, kernels, calls; and what it must not touch."""

import contextlib
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdpp
import needs
import problems
from problems import Counted, Problem, accepts, karras, mixture, run, seeded

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
SHAPE = (2, 3, 5, 7)
STEPS = 6
READS = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__float__",
    "__int__",
    "__array__",
    "nonzero",
)


class Ledger(TorchDispatchMode):
    """Counts latent-sized kernels and host reads, except while a network or noise source runs."""

    def __init__(self):
        super().__init__()
        self.paused, self.kernels, self.scalars = 0, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.paused:
            if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
                self.scalars.append(str(func))
            if not is_view(func) and latent_sized(result):
                self.kernels.append(str(func))
        return result

    @contextlib.contextmanager
    def pause(self):
        """Leaves out what happens inside."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def outside(self, call):
        """The callable, left out of the count."""

        def paused(*args, **kwargs):
            with self.pause():
                return call(*args, **kwargs)

        return paused


def is_view(func):
    """Whether an operator returns an alias of its argument that it does not write."""
    infos = [r.alias_info for r in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def latent_sized(result):
    """Whether an operator made a tensor of the latent's size or more."""
    results = result if isinstance(result, (tuple, list)) else [result]
    size = math.prod(SHAPE)
    return any(isinstance(each, torch.Tensor) and each.numel() >= size for each in results)


def measured(solver, ledger, sigmas, *, own_draws=False, **guidance):
    """A float32 run without CFG whose networks and noise stay out of the ledger."""
    x = seeded(*SHAPE, seed=1, dtype=torch.float32) * problems.SIGMA_MAX
    noise = seeded(*SHAPE, seed=2, dtype=torch.float32)
    cond = torch.zeros(2, 3)
    student = ledger.outside(lambda x, sigma, cond=None: 0.3 * x)
    teacher = ledger.outside(lambda x, sigma, cond=None: 0.2 * x)
    guidance = {"teacher_cfg_scale": 1.0, **guidance}
    if not own_draws:
        guidance["renoise_noise_sampler"] = ledger.outside(lambda *_: noise.clone())
    model = kdpp.TeacherGuidedDenoiser(student, teacher, **guidance)
    options = {"noise_sampler": ledger.outside(lambda *_: noise.clone())}
    with ledger:
        return run(solver, model, x, sigmas, extra_args={"cond": cond, "uncond": cond}, **options)


def kernels(row, cfg_pp):
    """One interpolation for each tensor that a row joins to the first, and one for its noise."""
    direction, guided = list(row.direction), list(row.guided or (0.0,))
    guided[0] += row.denoised
    if not cfg_pp:  # directions are the estimates themselves
        pairs = itertools.zip_longest(direction, guided, fillvalue=0.0)
        direction, guided = [sum(pair) for pair in pairs], []
    weights = [row.target, *direction, *guided, *(weight for weight, _ in row.past)]
    return max(1, sum(weight != 0.0 for weight in weights) - 1) + bool(row.noise)


@over_solvers
def test_latent_sized_kernels_per_step(solver):
    """As few as its rows allow, beside networks and noise."""
    ledger, sigmas = Ledger(), karras(STEPS)
    measured(solver, ledger, sigmas, teacher_scale=0.0)
    halves = 2 * solver.cfg_pp  # CFG's two are joined before a call, and mixed after it
    allowed = [halves + kernels(row, solver.cfg_pp) for _, row in problems.rows(solver, sigmas)]
    assert len(ledger.kernels) <= sum(allowed), ledger.kernels


@pytest.mark.parametrize(
    ("name", "most"),
    [("euler", 1), ("dpmpp_2m", 2), ("euler_ancestral", 2), ("dpmpp_2s_ancestral", 3), ("heun", 3),
     ("dpmpp_2m_sde", 3), ("dpmpp_3m_sde", 4), ("dpmpp_sde", 4)],
)  # fmt: skip
def test_the_rows_of_the_solvers_in_use_are_short(name, most):
    """What a step of theirs takes, in kernels: a plan that joins more tensors is a slower one."""
    solver, sigmas = kdpp.SOLVERS[name], karras(STEPS)
    each = [kernels(row, False) for _, row in problems.rows(solver, sigmas)]
    assert sum(each) <= most * STEPS


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@over_solvers
def test_a_guided_step_adds_at_most_two_kernels(solver, eta):
    """Renoise and revise: one kernel each, the network and the draw left out.

    A third one where renoising joins three tensors instead of two: estimate, point and fresh noise,
    or estimate, point and CFG++'s unconditional estimate; a fourth for all four.
    """
    counts = []
    for steps in (0, 1, 3):
        ledger = Ledger()
        guidance = {"teacher_scale": 0.1, "teacher_steps": steps, "renoise_eta": eta}
        measured(solver, ledger, karras(STEPS), **guidance)
        counts.append(len(ledger.kernels))
    mixing = (eta not in (0.0, 1.0)) + (eta < 1 and solver.cfg_pp)
    assert counts[1] - counts[0] <= 2 + mixing
    assert counts[2] - counts[0] <= 3 * (2 + mixing)


@pytest.mark.parametrize("own_draws", [False, True], ids=["given noise", "own draws"])
@pytest.mark.parametrize("steps", [2, 30])
@over_solvers
def test_the_loop_reads_nothing_back(solver, steps, own_draws, monkeypatch):
    """No host read in the loop, guided steps included, and one read of the sigmas at most.

    A latent on the CPU is looked at before the loop (tests/test_checks.py); on a device it is not.
    """
    ledger, reads = Ledger(), []
    look = ledger.outside(kdpp.driver.check_start)
    monkeypatch.setattr(kdpp.driver, "check_start", look)
    for name in READS:
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, counting(original, name, reads, ledger))
    guidance = {"teacher_scale": 0.1, "teacher_steps": steps}
    measured(solver, ledger, karras(steps), own_draws=own_draws, **guidance)
    assert not ledger.scalars
    assert len(reads) <= 1, reads


def counting(original, name, reads, ledger):
    """A tensor method that notes its use, generator states (bytes on the host) left out."""

    def method(self, *args, **kwargs):
        if not ledger.paused and self.dtype != torch.uint8:
            reads.append((name, tuple(self.shape), self.dtype))
        with ledger.pause():
            return original(self, *args, **kwargs)

    return method


@over_solvers
def test_a_latent_without_numbers_can_be_sampled(solver):
    """On the meta device every read would raise: the loop needs none."""
    x = torch.empty(SHAPE, device="meta")
    cond = torch.empty(2, 3, device="meta")
    model = kdpp.TeacherGuidedDenoiser(
        lambda x, sigma, cond=None: x * sigma[:, None, None, None],
        lambda x, sigma, cond=None: x * sigma[:, None, None, None],
        teacher_steps=9,
        renoise_noise_sampler=lambda *_: torch.empty_like(x),
    )
    options = {"noise_sampler": lambda *_: torch.empty_like(x), "s_churn": 2.0}
    extra = {"cond": cond, "uncond": cond, "cond_scale": 2.0}
    found = run(solver, model, x, karras(STEPS), extra_args=extra, **options)
    assert found.device.type == "meta"
    assert found.shape == x.shape


@needs.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@over_solvers
def test_no_synchronisation_on_a_gpu(solver):
    """CUDA's own watch: with sigmas on the host nothing in the run waits for the device."""
    x = torch.randn(SHAPE, device="cuda")
    model = kdpp.TeacherGuidedDenoiser(
        lambda x, sigma, cond=None: 0.3 * x,
        lambda x, sigma, cond=None: 0.2 * x,
        teacher_cfg_scale=1.0,
        teacher_steps=9,
    )
    cond = torch.zeros(2, 3, device="cuda")
    extra, sigmas = {"cond": cond, "uncond": cond}, karras(STEPS)
    expected = run(solver, model, x, sigmas.cuda(), extra_args=extra)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(solver, model, x, sigmas, extra_args=extra)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.shape == expected.shape
    assert found.device == x.device


# ------------------------------------------------------------------------- network calls


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("k", [0, 1, 2, 9])
@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
@over_solvers
def test_network_calls(solver, steps, k, cond_scale):
    """One call per evaluation, CFG in the same batch; the teacher once per guided step."""
    student, teacher = Counted(mixture(0)), Counted(mixture(1))
    problem = Problem(student=student, teacher=teacher, cond_scale=cond_scale)
    sigmas = karras(steps)
    model = problem.guided(teacher_scale=0.5, teacher_steps=k)
    run(solver, model, problem.start(sigmas), sigmas, extra_args=problem.extra_args)
    assert len(student.calls) == sum(problems.counts(solver, sigmas))
    assert len(teacher.calls) == min(k, steps - 1)  # the last step has no level to renoise to
    doubled = cond_scale != 1 or solver.cfg_pp
    assert {len(call.x) for call in student.calls} == {4 if doubled else 2}
    assert {len(call.x) for call in teacher.calls} <= {4}


@over_solvers
def test_a_teacher_without_cfg_runs_on_the_batch_alone(solver):
    """teacher_cfg_scale = 1: the conditional half and nothing else."""
    problem, sigmas = Problem(teacher=Counted(mixture(1)), teacher_cfg_scale=1.0), karras(3)
    run(solver, problem.guided(), problem.start(sigmas), sigmas, extra_args=problem.extra_args)
    assert [len(call.x) for call in problem.teacher.calls] == [2]


@pytest.mark.parametrize(("renoise", "expected"), [("next", 1), ("current", 0), (0.31, None)])
@over_solvers
def test_the_teacher_is_told_the_renoise_level(solver, renoise, expected):
    """The level that the teacher is given is the one that its input carries."""
    problem, sigmas = Problem(teacher=Counted(mixture(1))), karras(4)
    model = problem.guided(renoise=renoise)
    run(solver, model, problem.start(sigmas), sigmas, extra_args=problem.extra_args)
    level = renoise if expected is None else float(sigmas[expected])
    (call,) = problem.teacher.calls
    assert call.sigma.tolist() == pytest.approx([level] * 4, rel=1e-7)


# ------------------------------------------------------------------------- what is lent


@over_solvers
def test_nothing_that_is_lent_is_written(solver):
    """The caller's latent, sigmas and conditions, and what networks and noise sources return."""
    problem, sigmas = Problem(), karras(5)
    x, extra = problem.start(sigmas), problem.extra_args
    lent = [(x, x.clone()), (sigmas, sigmas.clone())]
    lent += [(extra[name], extra[name].clone()) for name in ("cond", "uncond")]

    def lending(call):
        def wrapped(*args, **kwargs):
            result = call(*args, **kwargs)
            lent.append((result, result.clone()))
            return result

        return wrapped

    problem.student, problem.teacher = lending(mixture(0)), lending(mixture(1))
    noise = lending(lambda *_: torch.ones_like(x))
    model = problem.guided(teacher_steps=9, renoise_noise_sampler=noise)
    seen = []
    options = {"noise_sampler": noise, "callback": lambda info: keep(info, seen)}
    for _ in range(2):
        run(solver, model, x, sigmas, extra_args=extra, s_churn=3.0, **options)
    for tensor, copy in [*lent, *seen]:
        assert torch.equal(tensor, copy)


def keep(info, seen):
    """Remembers every tensor of a callback's dict, and what it held at the time."""
    seen.extend((value, value.clone()) for value in info.values() if torch.is_tensor(value))


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
@pytest.mark.parametrize("levels", [(5.0, 0.0), (5.0, 2.0, 0.0), (5.0, 2.0), (5.0, 5.0)], ids=str)
@over_solvers
def test_the_result_is_nobody_elses_memory(solver, levels, cond_scale):
    """The image shares no memory with the latent, a network's output or a noise source's."""
    sigmas = torch.tensor(levels, dtype=torch.float64)
    problem = Problem(cond_scale=cond_scale, teacher_cfg_scale=cond_scale)
    x, outputs = problem.start(sigmas), []

    def remembering(call):
        def wrapped(*args, **kwargs):
            outputs.append(call(*args, **kwargs))
            return outputs[-1]

        return wrapped

    problem.student, problem.teacher = remembering(mixture(0)), remembering(mixture(1))
    guidance = {"teacher_scale": 1.0, "renoise": 0.5}
    noise = remembering(lambda *_: torch.ones_like(x))
    model = problem.guided(renoise_noise_sampler=noise, **guidance)
    options = {"noise_sampler": noise} if accepts(solver, "noise_sampler") else {}
    found = run(solver, model, x, sigmas, extra_args=problem.extra_args, **options)
    memory = {tensor.untyped_storage().data_ptr() for tensor in outputs}
    assert found.untyped_storage().data_ptr() not in memory
    if levels != (5.0, 5.0):
        assert found.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_a_schedule_is_planned_once(monkeypatch):
    """The same sampler, settings and levels: the coefficients are those of the run before."""
    made = []
    check = kdpp.plan.Row.check
    monkeypatch.setattr(kdpp.plan.Row, "check", lambda row, s: made.append(row) or check(row, s))
    problem, sigmas = Problem(), karras(7) * 0.9
    x = problem.start(sigmas)
    solver = kdpp.SOLVERS["dpmpp_2m_ancestral"]
    counts = []
    for eta in (1.0, 1.0, 0.5, 1.0):
        run(solver, problem.guided(), x, sigmas, extra_args=problem.extra_args, eta=eta)
        counts.append(len(made))
    assert counts == [7, 7, 14, 14]


@pytest.mark.parametrize("cond_scale", [1.0, 2.5])
@over_solvers
def test_a_network_that_reuses_its_output_spoils_no_image(solver, cond_scale):
    """One buffer for every answer (a CUDA graph's, say): the right image or a refusal."""
    problem, sigmas = Problem(cond_scale=cond_scale), karras(5)
    x = problem.start(sigmas)
    expected = problem.sample(solver, x, sigmas, {"teacher_steps": 2})
    problem.student, problem.teacher = Reusing(mixture(0)), Reusing(mixture(1))
    try:
        found = problem.sample(solver, x, sigmas, {"teacher_steps": 2})
    except ValueError as error:
        # Solvers that keep an answer for a later call cannot let it be overwritten.
        assert solver.keeps
        assert "into memory that holds an earlier one" in str(error)
    else:
        assert torch.equal(found, expected)


class Reusing(torch.nn.Module):
    """A denoiser that writes every answer of one shape into the same tensor."""

    def __init__(self, model):
        super().__init__()
        self.model, self.answers = model, {}

    def forward(self, x, sigma, cond=None):
        """The model's answer, in the buffer."""
        buffer = self.answers.setdefault(x.shape, torch.empty_like(x))
        return buffer.copy_(self.model(x, sigma, cond=cond))
