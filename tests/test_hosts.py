"""A host's own model as student and teacher: its CFG, its flow flag, its weights, its noise.

The hosts here are doubles of what running hosts hand to a sampler: a guider in an inpainting
wrapper, called with model options and a seed (ComfyUI), and a module that takes both conditions
(the web UIs).
"""

import contextlib
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import kdpp
from kdpp.kinds import trained_range
from problems import (
    SHAPE,
    CFGDenoiser,
    NeverCalled,
    Tape,
    conditions,
    karras,
    mixture,
    on_schedules,
    relative,
    run,
    seeded,
)

SIGMAS = karras(4)
BATCH = 3
COND, UNCOND = conditions(BATCH)
NOISE = seeded(BATCH, *SHAPE, seed=9)
X = NOISE * SIGMAS[0]
OPTIONS = {"model_options": {"transformer_options": {}}, "seed": 42, "denoise_mask": None}


class Guider:
    """ComfyUI's: holds conditions and the CFG scale, and skips the negative at a scale of 1."""

    def __init__(self, network, cfg=1.0):
        self.network, self.cfg = network, cfg
        self.calls = []

    def set_cfg(self, cfg):
        self.cfg = cfg

    def __call__(self, *args, **kwargs):
        return self.predict_noise(*args, **kwargs)

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        self.calls.append((timestep.clone(), self.cfg))
        options = model_options or {}
        rows = slice(0, len(x))
        cond = self.network(x, timestep, cond=COND[rows])
        uncond = None
        if self.cfg != 1.0 or options.get("disable_cfg1_optimization"):
            uncond = self.network(x, timestep, cond=UNCOND[rows])
        for hook in options.get("sampler_post_cfg_function", ()):
            hook({"uncond": uncond})
        return cond if uncond is None else torch.lerp(uncond, cond, self.cfg)


class Inpainting:
    """What ComfyUI hands to a sampler as its model."""

    def __init__(self, guider):
        self.inner_model = guider

    def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
        return self.inner_model(x, sigma, model_options=model_options, seed=seed)


def adapted(guider, flow=False, **levels):
    """The adapter that an integration writes for such a model."""
    model = Inpainting(guider)

    def ask(x, sigma, cfg_scale, **extra_args):
        heard = []
        extra_args["model_options"] = {
            "disable_cfg1_optimization": True,
            "sampler_post_cfg_function": [lambda args: heard.append(args["uncond"])],
        }
        if cfg_scale is not None:
            guider.set_cfg(cfg_scale)
        return model(x, sigma, **extra_args), heard[0]

    return kdpp.HostModel(ask, flow=flow, **levels)


def guided(student, teacher, **settings):
    return kdpp.TeacherGuidedDenoiser(
        student, teacher, teacher_scale=0.5, teacher_cfg_scale=4.0,
        renoise_noise_sampler=Tape(X, 6), **settings,
    )  # fmt: skip


# ------------------------------------------------------------------------------- HostModel


@pytest.mark.parametrize("solver", on_schedules(kdpp.SOLVERS), ids=lambda solver: solver.name)
def test_a_hosts_models_make_the_images_of_plain_denoisers(solver):
    """With each solver: the host's CFG is the CFG that kdpp does itself; CFG++, too."""
    hosts = guided(adapted(Guider(mixture(0), cfg=2.5)), adapted(Guider(mixture(1))))
    plain = guided(mixture(0), mixture(1))
    found = run(solver, hosts, X, SIGMAS, extra_args=OPTIONS, noise_sampler=Tape(X, 5))
    extra_args = {"cond": COND, "uncond": UNCOND, "cond_scale": 2.5}
    expected = run(solver, plain, X, SIGMAS, extra_args=extra_args, noise_sampler=Tape(X, 5))
    assert relative(found, expected) < 1e-13


def test_a_web_uis_model_gets_every_keyword_of_the_run():
    """Its scale comes from the run's extra_args, as its own samplers give it."""
    network = CFGDenoiser(mixture(0))
    student = kdpp.HostModel(
        lambda x, s, scale, **a: network(x, s, cond_scale=scale, **a), flow=False
    )
    teacher = adapted(Guider(mixture(1)))
    extra_args = {"cond": COND, "uncond": UNCOND, "cond_scale": 2.5}

    def ask(x, sigma, cfg_scale, cond, uncond):  # the teacher's own keywords of the same run
        assert cond is COND and uncond is UNCOND
        return teacher.model.ask(x, sigma, cfg_scale, denoise_mask=None)

    model = guided(student, kdpp.HostModel(ask, flow=False))
    found = kdpp.sample_euler_tg(model, X, SIGMAS, extra_args, disable=True)
    plain = guided(mixture(0), mixture(1))
    assert relative(found, kdpp.sample_euler_tg(plain, X, SIGMAS, extra_args, disable=True)) < 1e-13


def test_the_scale_is_the_teachers_and_the_hosts_own_where_none_is_given():
    """A student without cond_scale keeps what the host has set."""
    student, teacher = Guider(mixture(0), cfg=1.75), Guider(mixture(1), cfg=9.0)
    model = guided(adapted(student), adapted(teacher))
    kdpp.sample_euler_tg(model, X, SIGMAS, OPTIONS, disable=True)
    assert [cfg for _, cfg in student.calls] == [1.75] * 4
    assert [cfg for _, cfg in teacher.calls] == [4.0]
    kdpp.sample_euler_tg(model, X, SIGMAS, {**OPTIONS, "cond_scale": 3.0}, disable=True)
    assert [cfg for _, cfg in student.calls[4:]] == [3.0] * 4


def test_calling_the_pair_is_calling_the_student():
    """Also in k-diffusion's own samplers, which know nothing of the adapter."""
    model = guided(adapted(Guider(mixture(0), cfg=2.0)), adapted(Guider(mixture(1))))
    sigma = X.new_full((BATCH,), 3.0)
    expected = torch.lerp(mixture(0)(X, sigma, cond=UNCOND), mixture(0)(X, sigma, cond=COND), 2.0)
    torch.testing.assert_close(model(X, sigma, **OPTIONS), expected)


def without_uncond(x, sigma, cfg_scale, **extra_args):
    return mixture(0)(x, sigma, cond=COND), None


@pytest.mark.parametrize(
    "ask", [without_uncond, lambda *a, **k: without_uncond(*a, **k)[0]], ids=["None", "one answer"]
)
def test_cfg_pp_without_the_unconditional_estimate_is_an_error(ask):
    """Zeros in its place would spoil the picture. Other samplers do not need it."""
    model = guided(kdpp.HostModel(ask, flow=False), adapted(Guider(mixture(1))))
    kdpp.sample_euler_tg(model, X, SIGMAS, OPTIONS, disable=True)
    with pytest.raises(ValueError, match=r"CFG\+\+ needs the uncond.*at every CFG scale, 1 incl"):
        kdpp.sample_euler_cfg_pp_tg(model, X, SIGMAS, OPTIONS, disable=True)


def test_an_unconditional_estimate_serves_one_call():
    """One that the host computed at an earlier call is not taken for a later call's."""
    answers = [(X, UNCOND), (X, None), (X, UNCOND), X]
    model = kdpp.HostModel(lambda x, sigma, cfg_scale: answers.pop(0), flow=False)
    model(X, SIGMAS[:BATCH])
    assert model.uncond_denoised() is UNCOND
    for calls in (1, 2):  # the second time, one that nobody asked for
        for _ in range(calls):
            model(X, SIGMAS[:BATCH])
        with pytest.raises(ValueError, match="the host gave none"):
            model.uncond_denoised()


@pytest.mark.parametrize("answer", [None, [X, X], (X,), (X, X, X)], ids=["None", "list", "1", "3"])
def test_other_answers_are_refused(answer):
    model = kdpp.HostModel(lambda x, sigma, cfg_scale: answer, flow=False)
    with pytest.raises(TypeError, match=r"host's model returned (NoneType|list|tuple).*\(denoised"):
        model(X, SIGMAS[:BATCH])


def flow_network(seed):
    """A flow model that is known: the VE mixture at σ = τ/(1-τ), in flow's coordinates."""
    return kdpp.as_flow(mixture(seed), sigma_max=1e4)


def test_a_flow_model_of_a_host():
    """It is sampled as the flow model that it is; beside a VE teacher it is refused."""
    sigmas = torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    x = 0.9 * NOISE
    networks = flow_network(0), flow_network(1)
    hosts = [adapted(Guider(one, cfg=2.0), flow=True) for one in networks]
    extra_args = {"cond": COND, "uncond": UNCOND, "cond_scale": 2.0}
    found, expected = (
        kdpp.sample_lcm_tg(guided(*pair), x, sigmas, extra, disable=True, noise_sampler=Tape(x, 5))
        for pair, extra in ((hosts, OPTIONS), (networks, extra_args))
    )
    assert relative(found, expected) < 1e-13
    other = [adapted(Guider(one, cfg=2.0), flow=False) for one in networks]
    wrong = kdpp.sample_lcm_tg(
        guided(*other), x, sigmas, OPTIONS, disable=True, noise_sampler=Tape(x, 5)
    )
    assert relative(wrong, expected) > 0.1  # which is why the flag must be given
    with pytest.raises(ValueError, match="must both be flow models or both not"):
        kdpp.sample_lcm_tg(guided(hosts[0], other[1]), x, sigmas, OPTIONS)


@pytest.mark.parametrize("flow", [None, 0, "flow", torch.tensor(True)])
def test_the_flow_flag_must_be_given(flow):
    with pytest.raises(TypeError, match="flow"):
        kdpp.HostModel(without_uncond)
    with pytest.raises(
        TypeError, match=r"flow is .*; it must be True for a flow model, else False"
    ):
        kdpp.HostModel(without_uncond, flow=flow)


@pytest.mark.parametrize(
    ("levels", "flow"),
    [
        ((0.03, None), False),
        ((None, 14.6), False),
        ((14.6, 0.03), False),
        ((-1.0, 1.0), False),
        ((0.0, torch.ones(2)), False),
        ((0.0, float("inf")), False),
        (("0", "1"), False),
        ((0.0, 14.6), True),
    ],
)
def test_trained_levels_are_checked(levels, flow):
    low, high = levels
    allowed = "0 ≤ sigma_min < sigma_max" + (" ≤ 1, as a flow" if flow else "$")
    with pytest.raises(ValueError, match=f"give both or neither, with {allowed}"):
        kdpp.HostModel(without_uncond, flow=flow, sigma_min=low, sigma_max=high)


def test_the_teacher_is_asked_within_its_levels():
    """A tensor's number will do, and a wrapper of kdpp's passes the levels on."""
    guider = Guider(mixture(1))
    levels = {"sigma_min": torch.tensor(0.5), "sigma_max": 9}
    teacher = adapted(guider, **levels)
    assert trained_range(teacher) == (0.5, 9.0)
    assert trained_range(adapted(guider)) is None
    moved = kdpp.swapped(teacher, lambda: None, lambda: None)
    assert trained_range(moved) == (0.5, 9.0) and moved.flow is False
    student = adapted(Guider(mixture(0)))
    model = guided(student, moved, renoise="current")
    with pytest.warns(UserWarning, match=r"outside the teacher's trained range, \[0.5, 9\]"):
        kdpp.sample_euler_tg(model, X, SIGMAS, OPTIONS, disable=True)
    assert [level.tolist() for level, _ in guider.calls] == [[9.0] * BATCH]


def test_the_hosts_module_stays_where_it_is():
    """kdpp's wrappers neither move it nor cast it, nor count it among their modules."""
    network = CFGDenoiser(mixture(0))
    model = guided(kdpp.HostModel(network, flow=False), adapted(Guider(mixture(1))))
    model.half().to("meta")
    assert network.inner_model.means.dtype == torch.float64
    assert network.inner_model.means.device.type == "cpu"
    assert not any(one is network for one in model.modules())


def test_a_deep_copy_keeps_its_own_unconditional_estimate():
    """The host's model is one; what it said last is each copy's own."""
    original = kdpp.HostModel(
        lambda x, sigma, cfg_scale: (x, -x), flow=True, sigma_min=0, sigma_max=1
    )
    twin = copy.deepcopy(original)
    assert twin.flow is True and trained_range(twin) == (0.0, 1.0)
    original(X, SIGMAS[:BATCH])
    with pytest.raises(ValueError, match="the host gave none"):
        twin.uncond_denoised()
    assert torch.equal(original.uncond_denoised(), -X)


@pytest.mark.parametrize("ask", [None, 3, "euler"])
def test_only_what_can_be_called_can_be_asked(ask):
    with pytest.raises(TypeError, match=rf"HostModel takes a function.* not {ask!r}"):
        kdpp.HostModel(ask, flow=False)


def test_the_page_runs():
    """Every example of docs/hosts.md, one after the other, as a reader would type them."""
    page = Path(__file__).parents[1] / "docs" / "hosts.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 3
    variables = {}
    for example in examples:
        exec(compile(example, str(page), "exec"), variables)
        assert variables["images"].isfinite().all()


# --------------------------------------------------------------------------- the way there


def bare_model():
    """The host's model as it is, in a sampler."""
    kdpp.sample_euler_tg(Inpainting(Guider(mixture(0))), X, SIGMAS, OPTIONS, disable=True)


def bare_teacher():
    """The host's model as it is, as a teacher."""
    model = guided(mixture(0), Inpainting(Guider(mixture(1))))
    kdpp.sample_euler_tg(model, X, SIGMAS, OPTIONS, disable=True)


def marked_teacher():
    """Marked by OwnCFG, which it has, though not by a keyword: said before any network's call."""
    model = guided(NeverCalled(), kdpp.OwnCFG(Inpainting(Guider(mixture(1)))))
    kdpp.sample_euler_tg(model, X, SIGMAS, {}, disable=True)


def marked_guider():
    """The same, where the signature tells nothing."""
    model = guided(lambda x, sigma, **a: x / 2, kdpp.OwnCFG(Guider(mixture(1))))
    kdpp.sample_euler_tg(model, X, SIGMAS, {}, disable=True)


@pytest.mark.parametrize("natural", [bare_model, bare_teacher, marked_teacher, marked_guider])
def test_what_comes_natural_in_a_host_leads_to_the_adapter(natural):
    with pytest.raises((TypeError, ValueError), match=r"kdpp\.HostModel"):
        natural()


def test_a_type_error_of_the_hosts_own_passes():
    """Only the one about the scale is kdpp's to explain."""

    def broken(x, sigma, cond_scale):
        raise TypeError("unsupported operand")

    with pytest.raises(TypeError, match=r"^unsupported operand$"):
        kdpp.OwnCFG(broken)(X, SIGMAS[:BATCH], cond_scale=1.0)


# --------------------------------------------------------------------------- shared weights


class Patched(nn.Module):
    """One network whose weights a host patches for whoever is loaded: student or teacher."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.full((), 0.5, dtype=torch.float64))
        self.before = self.weight.clone()
        self.events = []

    def load(self, name):
        def patch():
            self.events.append(name)
            self.weight.fill_(0.25) if name == "teacher" else self.weight.copy_(self.before)

        return patch

    def forward(self, x, sigma, cfg_scale=None):
        self.events.append(float(self.weight))
        return self.weight * x


class Interrupt(BaseException):
    """As hosts raise it, past every ``except Exception``."""


def shared(network, teacher_call=None, enter=None):
    """Student and teacher on one network, as a host has them."""
    teacher = kdpp.swapped(
        kdpp.HostModel(teacher_call or network, flow=False),
        enter=enter or network.load("teacher"),
        leave=network.load("student"),
    )
    return guided(kdpp.HostModel(network, flow=False), teacher, teacher_steps=2)


def test_the_teachers_weights_are_there_in_its_calls_alone():
    """The student's are back after each, to the bit."""
    network = Patched()
    kdpp.sample_euler_tg(shared(network), X, SIGMAS, disable=True)
    step = [0.5, "teacher", 0.25, "student"]
    assert network.events == [*step, *step, 0.5, 0.5]
    assert torch.equal(network.weight, network.before)


def test_swapped_weights_make_the_images_of_two_networks():
    found = kdpp.sample_euler_tg(shared(Patched()), X, SIGMAS, disable=True)
    two = guided(
        kdpp.HostModel(lambda x, s, c: 0.5 * x, flow=False),
        kdpp.HostModel(lambda x, s, c: 0.25 * x, flow=False),
        teacher_steps=2,
    )
    assert torch.equal(found, kdpp.sample_euler_tg(two, X, SIGMAS, disable=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupt])
@pytest.mark.parametrize("where", ["enter", "call"])
def test_the_student_is_back_whatever_ends_the_teachers_call(error, where):
    """Also where the host was stopped half way through loading; the next run is a clean one."""
    network = Patched()
    expected = kdpp.sample_euler_tg(shared(Patched()), X, SIGMAS, disable=True)

    def fails(*args, **kwargs):
        network.load("teacher")()
        raise error("stopped")

    given = {"enter": fails} if where == "enter" else {"teacher_call": fails}
    with pytest.raises(error, match="stopped"):
        kdpp.sample_euler_tg(shared(network, **given), X, SIGMAS, disable=True)
    assert torch.equal(network.weight, network.before) and network.events[-1] == "student"
    assert torch.equal(kdpp.sample_euler_tg(shared(network), X, SIGMAS, disable=True), expected)


def test_a_swapped_teacher_says_and_does_what_the_denoiser_does():
    """Marked where it was, whole batches where it was, the range and the kind of the inside."""
    plain = kdpp.swapped(mixture(1), list, list)
    assert not isinstance(plain, kdpp.OwnCFG)
    extra_args = {"cond": COND, "uncond": UNCOND}
    found, expected = (
        kdpp.sample_euler_tg(guided(mixture(0), one), X, SIGMAS, extra_args, disable=True)
        for one in (plain, mixture(1))
    )
    assert torch.equal(found, expected)
    distilled = kdpp.GuidanceConditioned(kdpp.FlowDenoiser(lambda x, t, w: x))
    marked = kdpp.swapped(distilled, list, list)
    assert isinstance(marked, kdpp.OwnCFG) and marked.divisible and marked.flow


@pytest.mark.parametrize("place", ["enter", "leave"])
def test_enter_and_leave_are_functions(place):
    given = {"enter": list, "leave": list, place: contextlib.nullcontext()}
    with pytest.raises(TypeError, match=f"{place} is .*; it must be a function without arguments"):
        kdpp.swapped(mixture(1), **given)
    with pytest.raises(TypeError, match="denoiser is None"):
        kdpp.swapped(None, list, list)


# --------------------------------------------------------------------------- noise by rows

LATENT = seeded(BATCH, *SHAPE, seed=3)


def test_a_rows_seed_depends_on_the_row_and_the_seed_alone():
    """In any batch, at any place, in any layout; other numbers or another seed give another."""
    seeds = kdpp.row_seeds(7, NOISE, LATENT)
    for rows in ([0], [2, 1], [1, 1, 0, 2]):
        assert kdpp.row_seeds(7, NOISE[rows], LATENT[rows]) == [seeds[i] for i in rows]
    turned = NOISE.transpose(1, -1).contiguous().transpose(1, -1)
    assert kdpp.row_seeds(7, turned, LATENT) == seeds
    others = [
        kdpp.row_seeds(8, NOISE, LATENT),
        kdpp.row_seeds(7, NOISE),
        kdpp.row_seeds(7, LATENT, NOISE),
        kdpp.row_seeds(7, NOISE.flatten(1), LATENT),
        kdpp.row_seeds(7, NOISE + torch.finfo(torch.float64).eps, LATENT),
    ]
    assert len({*seeds, *(seed for other in others for seed in other)}) == 6 * BATCH
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_equal_rows_have_equal_seeds():
    """They are the same picture, so their noise is the same, too."""
    assert len(set(kdpp.row_seeds(7, NOISE[[1, 1, 1]]))) == 1
    zeros = torch.zeros(2, 4)
    zeros[1] = -0.0
    assert len(set(kdpp.row_seeds(7, zeros))) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_dtype_that_holds_the_numbers_changes_no_seed(dtype):
    small = NOISE.to(dtype)
    assert kdpp.row_seeds(7, small) == kdpp.row_seeds(7, small.double())


def test_the_seeds_are_these_for_ever():
    """A stored picture is drawn again by another version, on another machine."""
    x = torch.arange(8, dtype=torch.float32).reshape(2, 2, 2) / 4
    assert kdpp.row_seeds(42, x) == KNOWN_SEEDS
    assert kdpp.row_seeds(2**64 - 1, x) != KNOWN_SEEDS  # ComfyUI's seeds have 64 bits


KNOWN_SEEDS = [4391666859300583117, 5435165515250323384]


@pytest.mark.parametrize(
    ("seed", "shown", "error", "message"),
    [
        (1.0, [NOISE], ValueError, "seed is 1.0; it must be a whole number"),
        (None, [NOISE], ValueError, "seed is None"),
        (True, [NOISE], ValueError, "seed is True"),
        (1, [], ValueError, r"tensors of \[\] rows; give one tensor or more"),
        (1, [NOISE, NOISE[:2]], ValueError, r"tensors of \[3, 2\] rows"),
        (1, [NOISE.int()], TypeError, "a tensor of rows has dtype torch.int32"),
        (1, [[1.0, 2.0]], TypeError, "a tensor of rows is a list"),
    ],
)
def test_what_seeds_are_made_of_is_checked(seed, shown, error, message):
    with pytest.raises(error, match=message):
        kdpp.row_seeds(seed, *shown)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "lcm", "euler_ancestral_cfg_pp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_i_is_the_same_in_any_batch(name, dtype):
    """Solver noise and renoise by rows: a batch of 3 is 3 runs of one."""
    solver = kdpp.SOLVERS[name]

    def image(rows):
        noise = NOISE[rows].to(dtype)
        x = noise * SIGMAS[0].to(dtype)
        seeds = kdpp.row_seeds(7, noise)
        low, high = SIGMAS[-2], SIGMAS[0]
        source = (
            kdpp.BrownianNoise(x, low, high, seed=seeds)
            if solver.noise == "brownian"
            else kdpp.SeededNoise(x, seeds)
        )
        model = kdpp.TeacherGuidedDenoiser(
            mixture(0), mixture(1), teacher_scale=0.5, teacher_cfg_scale=2.0,
            renoise_noise_sampler=kdpp.SeededNoise(x, seeds, stream=1),
        )  # fmt: skip
        extra_args = {"cond": COND[rows], "uncond": UNCOND[rows]}
        return run(solver, model, x, SIGMAS, extra_args=extra_args, noise_sampler=source)

    batch = image([0, 1, 2])
    rounding = 1e-5 if dtype == torch.float32 else 0.02  # the networks', which depends on the batch
    for i in range(BATCH):
        assert relative(batch[[i]], image([i])) < rounding
    assert relative(batch[[0]], batch[[1]]) > 0.1


# --------------------------------------------------------------------------- the host's k-diffusion


@pytest.fixture
def named():
    """Names the host's k-diffusion; afterwards it is what it was."""
    yield kdpp.kdiffusion.use
    kdpp.kdiffusion.use()


@pytest.fixture
def host_package(monkeypatch):
    """A host's module of noise under a name of its own: always the same number."""
    host, sampling = ModuleType("host.k"), ModuleType("host.k.sampling")
    sampling.default_noise_sampler = lambda x: lambda sigma, sigma_next: torch.full_like(x, 0.5)
    sampling.BrownianTreeNoiseSampler = lambda x, low, high: lambda *_: torch.full_like(x, 0.25)
    for module in (ModuleType("host"), host, sampling):
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return sampling


def noise_of(name):
    """The first noise that a solver draws by itself: the image of a student that says zero."""
    model = kdpp.TeacherGuidedDenoiser(lambda x, s: 0 * x, lambda x, s: x, teacher_steps=0)
    zeros, sigmas = torch.zeros(1, 4), torch.tensor([2.0, 1.0])
    torch.manual_seed(0)
    options = {"s_noise": 1.0} if name == "dpmpp_2m_sde" else {}
    image = kdpp.sample(name, model, zeros, sigmas, disable=True, **options)
    return image / image.norm()


def test_default_noise_is_the_named_packages_at_the_time_of_the_run(named, host_package):
    """reForge hands per-image seeds to a module of another name, and hosts reload theirs."""
    constant = torch.full((1, 4), 0.5)
    before = noise_of("euler_ancestral")
    assert not torch.equal(before, constant)
    named("host.k")
    torch.testing.assert_close(noise_of("euler_ancestral"), constant)
    torch.testing.assert_close(noise_of("dpmpp_2m_sde"), constant)
    assert kdpp.kdiffusion.sampling is host_package
    host_package.default_noise_sampler = lambda x: lambda *_: torch.eye(4)[:1]
    torch.testing.assert_close(noise_of("euler_ancestral"), torch.eye(4)[:1])
    named()
    assert torch.equal(noise_of("euler_ancestral"), before)


def test_what_the_named_package_lacks_is_kdpps_own(named, host_package):
    named("host.k")
    assert repr(kdpp.kdiffusion.external).startswith("<kdpp's own in place of k_diffusion.external")


def test_no_k_diffusion_can_be_asked_for(named, recwarn):
    """Then nothing of it is imported, and SDE samplers take BrownianNoise without a warning."""
    named(None)
    assert repr(kdpp.kdiffusion.sampling).startswith("<kdpp's own in place of k_diffusion.sampling")
    torch.manual_seed(0)
    noise = kdpp.BrownianNoise(torch.zeros(1, 4), 1.0, 2.0).between(2.0, 1.0)
    torch.testing.assert_close(noise_of("dpmpp_2m_sde"), noise / noise.norm())
    assert not recwarn.list


def test_a_package_that_is_not_there_is_an_error_and_changes_nothing(named, host_package):
    named("host.k")
    with pytest.raises(ImportError, match="nowhere"):
        named("nowhere.k")
    del host_package.default_noise_sampler
    with pytest.raises(ValueError, match=r"host\.k\.sampling has no default_noise_sampler"):
        named("host.k")
    assert kdpp.kdiffusion.package() == "host.k"


FOUND_BY_ACCIDENT = """
import sys
from importlib.machinery import PathFinder
class Host:
    def find_spec(name, path=None, target=None):
        if name == "k_diffusion":  # as where no k-diffusion is installed
            return PathFinder.find_spec(name, [sys.argv[1]])
sys.meta_path.insert(0, Host)
"""


def test_a_hosts_folder_of_that_name_is_not_imported_by_accident(tmp_path):
    """ComfyUI has its own fork's folder on sys.path; asked for by its own name it is taken."""
    part = tmp_path / "comfy" / "k_diffusion"
    part.mkdir(parents=True)
    (part / "sampling.py").write_text("def default_noise_sampler(x): return lambda *_: 0 * x\n")
    code = (
        FOUND_BY_ACCIDENT + "import json, kdpp\n"
        "own = repr(kdpp.kdiffusion.sampling)\n"
        "taken = [name for name in sys.modules if name.startswith('k_diffusion.')]\n"
        "sys.path.append(sys.argv[2])\n"
        "kdpp.kdiffusion.use('comfy.k_diffusion')\n"
        "asked = kdpp.kdiffusion.sampling.__name__\n"
        "print(json.dumps([own, taken, asked]))\n"
    )
    made = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, str(part.parent), str(tmp_path)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    own, taken, asked = json.loads(made.stdout)
    assert "the k_diffusion on sys.path is a part of another package" in own
    assert not taken and asked == "comfy.k_diffusion.sampling"
