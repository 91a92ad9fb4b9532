"""Network calls: fused, capped, shared by stacked teachers; borrowed teachers come and go."""

from functools import partial
from operator import itemgetter

import numpy as np
import pytest
import torch
from torch import nn

import kdpp
import problems
from kdpp import Teacher
from kdpp.asking import bind
from kdpp.denoisers import Rows
from problems import Counted, Problem, karras, mixture, run, seeded

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
EULER = kdpp.SOLVERS["euler"]
BATCH = 3
EXTRA = {
    "cond": seeded(BATCH, 3, seed=1),
    "uncond": seeded(BATCH, 3, seed=2),
    "cond_scale": 2.0,
}


def sample(model, solver=EULER, steps=3, extra=EXTRA, **options):
    """A run from a fixed latent with the solver's noise fixed."""
    torch.manual_seed(0)
    sigmas = karras(steps)
    x = seeded(BATCH, *problems.SHAPE, seed=5) * sigmas[0]
    drawn = iter(seeded(BATCH, *problems.SHAPE, seed=70 + i) for i in range(99))
    options["noise_sampler"] = lambda *_: next(drawn)
    return run(solver, model, x, sigmas, extra_args=extra, **options)


def guided(student, teachers, **settings):
    """A wrapper whose renoise draws are fixed."""
    drawn = iter(seeded(BATCH, *problems.SHAPE, seed=40 + i) for i in range(99))
    settings = {"renoise_noise_sampler": lambda *_: next(drawn), **settings}
    return kdpp.TeacherGuidedDenoiser(student, teachers, **settings)


# ------------------------------------------------------------------------------- fused calls


@over_solvers
def test_all_that_one_teacher_is_asked_at_a_step_is_one_call(solver):
    """Draws, several levels, two conditions, CFG or none: one call with the rows of them all."""
    counted = Counted(mixture(1))
    other = {"cond": seeded(BATCH, 3, seed=8)}
    teachers = [
        Teacher(counted, scale=0.3, cfg_scale=3.0, draws=2),
        Teacher(counted, scale=0.2, cfg_scale=1.0, renoise=0.4, extra_args=other),
    ]
    found = sample(guided(mixture(0), teachers), solver)
    (call,) = counted.calls
    assert len(call.x) == BATCH * (2 + 2 + 1)
    levels = call.sigma.reshape(-1, BATCH)
    assert (levels == levels[:, :1]).all() and levels[-1, 0] == 0.4
    conds = call.extra["cond"].reshape(-1, BATCH, 3)
    asked = [EXTRA["uncond"], EXTRA["cond"]] * 2 + [other["cond"]]
    assert all(map(torch.equal, conds, asked))
    # Two networks that are equal but not the same are asked apart; the image is the same.
    apart = [Counted(mixture(1)) for _ in range(2)]
    settings = [
        Teacher(apart[0], scale=0.3, cfg_scale=3.0, draws=2),
        Teacher(apart[1], scale=0.2, cfg_scale=1.0, renoise=0.4, extra_args=other),
    ]
    expected = sample(guided(mixture(0), settings), solver)
    assert [len(one.calls) for one in apart] == [1, 1]
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_lessons_keep_their_order_though_calls_are_shared():
    """Teachers A, B, A: two calls, and what the callback hears stands in the teachers' order."""
    one, two = Counted(mixture(1)), Counted(mixture(2))
    levels = (0.3, 0.5, 0.8)
    teachers = [
        Teacher(net, scale=0.2, cfg_scale=1.0, renoise=level)
        for net, level in zip((one, two, one), levels)
    ]
    heard = []
    sample(guided(mixture(0), teachers), callback=heard.append)
    assert (len(one.calls), len(two.calls)) == (1, 1)
    first, third = one.calls[0].output.chunk(2)
    expected = [first, two.calls[0].output, third]
    assert all(map(torch.equal, heard[0]["denoised_teacher"], expected))
    student = heard[0]["denoised_student"]
    revised = student + sum(0.2 * (taught - student) for taught in expected)
    assert torch.allclose(heard[0]["denoised_revised"], revised, rtol=0, atol=1e-12)


def test_a_teacher_with_its_own_cfg_is_asked_draw_by_draw():
    """What does its own CFG gets its keywords as they are, so its draws cannot be joined."""
    calls = []

    def own(x, sigma, uncond, cond, cond_scale):
        calls.append((len(x), cond_scale))
        return mixture(1)(x, sigma, cond)

    teacher = Teacher(kdpp.OwnCFG(own), draws=2, cfg_scale=3.0)
    sample(guided(mixture(0), teacher, max_batch=1), extra={**EXTRA, "cond_scale": 1.0})
    assert calls == [(BATCH, 3.0)] * 2


# ------------------------------------------------------------------------------- the cap


@pytest.mark.parametrize(
    ("max_batch", "student", "teacher"),
    [
        (None, [6], [12]),
        (99, [6], [12]),
        (12, [6], [12]),
        (11, [6], [6, 6]),
        (5, [3, 3], [4, 4, 4]),
        (4, [3, 3], [4, 4, 4]),
        (1, [1] * 6, [1] * 12),
    ],
)
@over_solvers
def test_a_cap_splits_calls_evenly(solver, max_batch, student, teacher):
    """No call has more rows than the cap, as few calls as that allows; the image is the same."""
    nets = [Counted(mixture(0)), Counted(mixture(1))]
    teachers = Teacher(nets[1], cfg_scale=3.0, draws=2)
    found = sample(guided(nets[0], teachers, max_batch=max_batch), solver, steps=2)
    rows = [len(call.x) for call in nets[0].calls]
    assert rows == student * (len(rows) // len(student))
    assert [len(call.x) for call in nets[1].calls] == teacher
    plain = Teacher(mixture(1), cfg_scale=3.0, draws=2)
    expected = sample(guided(mixture(0), plain), solver, steps=2)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_batch_first_tensors_are_split_with_their_rows():
    """Nested, too; anything that is not batch-first goes to every call as it is."""
    seen = []

    def network(x, sigma, cond, table, mode):
        seen.append((cond["a"].tolist(), table.shape, mode))
        return x

    extra = {"cond": {"a": torch.arange(4.0)}, "table": torch.zeros(7, 2), "mode": "z"}
    x = torch.zeros(4, 1)
    denoise = bind(network, "student", x, extra, max_batch=3)
    denoise(x, torch.ones(4))
    assert seen == [([0.0, 1.0], (7, 2), "z"), ([2.0, 3.0], (7, 2), "z")]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_a_cap_must_be_a_whole_number(value):
    """Refused when the wrapper is made."""
    with pytest.raises(ValueError, match="max_batch"):
        guided(mixture(0), mixture(1), max_batch=value)


def test_conditions_that_do_not_fit_into_one_batch_are_refused():
    """By name, before any network is called."""
    extra = {**EXTRA, "uncond": torch.zeros(BATCH, 4)}
    with pytest.raises(ValueError, match=r"cond.*\(3, 4\)"):
        sample(guided(problems.NeverCalled(), mixture(1)), extra=extra)


# ------------------------------------------------------------------------------- shared, by sample


class Sized(nn.Module):
    """A denoiser with a shared tensor of two numbers, which every call must get whole."""

    def forward(self, x, sigma, cond, size):
        assert size.shape == (2,)
        return 0.1 * x * size[0] + cond[:, :, None, None] * size[1]


@pytest.mark.parametrize("max_batch", [None, 1, 2])
def test_a_shared_tensor_is_never_cut(max_batch):
    """One sample under CFG: a tensor of two numbers is not its two halves."""
    extra = {"cond": seeded(1, 3, seed=1), "uncond": seeded(1, 3, seed=2), "cond_scale": 3.0}
    extra["size"] = torch.tensor([3.0, 5.0])
    model = kdpp.TeacherGuidedDenoiser(Sized(), Sized(), max_batch=max_batch)
    x, sigmas = seeded(1, *problems.SHAPE, seed=5), karras(3)
    torch.manual_seed(0)
    found = run(EULER, model, x, sigmas, extra_args=extra)
    whole = kdpp.TeacherGuidedDenoiser(Sized(), Sized())
    torch.manual_seed(0)
    assert torch.allclose(found, run(EULER, whole, x, sigmas, extra_args=extra), atol=1e-12)


def test_a_shared_tensor_goes_whole_to_stacked_teachers():
    """Though it is as long as their joined call."""
    extra = {"cond": seeded(1, 3, seed=1), "uncond": seeded(1, 3, seed=2)}
    extra["size"] = torch.tensor([3.0, 5.0])
    pairs = ([Sized(), Sized()], kdpp.stack_teachers(Sized(), Sized()))
    apart, stacked = ([Teacher(one, 0.3, cfg_scale=1.0) for one in pair] for pair in pairs)
    x, found = seeded(1, *problems.SHAPE, seed=5), []
    for teachers in (apart, stacked):
        torch.manual_seed(0)
        model = kdpp.TeacherGuidedDenoiser(Sized(), teachers)
        found.append(run(EULER, model, x, karras(3), extra_args=extra))
    assert torch.allclose(*found, atol=1e-12)


TEXTS = {"a": 0.3, "bb": -0.5, "": 0.0}


def reading(x, sigma, cond):
    """A denoiser whose condition is a list of texts, one for each row."""
    assert len(cond) == len(x)
    shift = torch.tensor([TEXTS[text] for text in cond], dtype=x.dtype).view(-1, 1, 1, 1)
    return 0.2 * x + shift


@pytest.mark.parametrize("max_batch", [None, 1, 3])
def test_texts_go_with_their_samples(max_batch):
    """Lists of prompts are joined for CFG and cut for a cap, as tensors are."""
    x = seeded(5, *problems.SHAPE, seed=5)

    def images(conds, rows, **settings):
        x_here = x[rows]
        model = kdpp.TeacherGuidedDenoiser(
            reading, reading, renoise_noise_sampler=lambda *_: torch.zeros_like(x_here), **settings
        )
        extra = {"cond": conds, "uncond": [""] * len(conds), "cond_scale": 3.0}
        return run(EULER, model, x_here, karras(3), extra_args=extra)

    texts = ["a", "bb", "", "bb", "a"]
    found = images(texts, list(range(5)), max_batch=max_batch)
    alone = [images([text], [row]) for row, text in enumerate(texts)]
    assert torch.allclose(found, torch.cat(alone), atol=1e-12)


def test_texts_beside_something_else_are_refused():
    """They would go whole to every call."""
    model = kdpp.TeacherGuidedDenoiser(reading, reading, teacher_cfg_scale=1.0, max_batch=1)
    x = seeded(2, *problems.SHAPE, seed=5)
    with pytest.raises(ValueError, match=r"extra_args holds \[None, 'bb'\]; texts beside"):
        run(EULER, model, x, karras(3), extra_args={"cond": [None, "bb"]})


def test_teachers_of_one_network_whose_keywords_differ_are_asked_apart():
    """Other texts, or conditions of another length: two calls, and the images of two networks."""

    class Styled(nn.Module):
        def forward(self, x, sigma, cond, style):
            return 0.2 * x + cond.mean() + {"oil": 1.0, "ink": -1.0}[style]

    network = Counted(Styled())
    extra = {"cond": seeded(2, 3, seed=1), "style": "oil"}
    longer = {"style": "ink", "cond": seeded(2, 7, seed=2)}
    x, found = seeded(2, *problems.SHAPE, seed=5), []
    for networks in ((network, network), (Styled(), Styled())):
        teachers = [
            Teacher(one, 0.3, cfg_scale=1.0, extra_args=own)
            for one, own in zip(networks, ({}, longer))
        ]
        model = kdpp.TeacherGuidedDenoiser(
            Styled(), teachers, renoise_noise_sampler=lambda *_: torch.zeros_like(x)
        )
        found.append(run(EULER, model, x, karras(3), extra_args=extra))
    assert torch.equal(*found)
    assert [call.extra["style"] for call in network.calls] == ["oil", "ink"]


@pytest.mark.parametrize(
    ("cond", "uncond"),
    [
        (np.zeros((2, 3)), np.ones((2, 3))),
        (object(), object()),
        (1, True),
        (torch.zeros(1, 3), torch.zeros(1, 3)),
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        ("a", "b"),
    ],
    ids=["numpy", "objects", "1 and True", "one row", "other shapes", "texts"],
)
def test_what_cannot_be_joined_is_said(cond, uncond):
    """A ValueError before any call: what was given, and how many rows there must be."""
    extra = {"cond": cond, "uncond": uncond, "cond_scale": 2.0}
    model = kdpp.TeacherGuidedDenoiser(problems.NeverCalled(), problems.NeverCalled())
    with pytest.raises(
        ValueError, match=r"cond does not fit into one batch of 2 \+ 2.*2 rows each"
    ):
        run(EULER, model, seeded(2, *problems.SHAPE, seed=5), karras(3), extra_args=extra)


def test_one_object_for_both_halves_is_shared():
    """Arrays and objects that are the same in both halves go with both."""
    shared = {"table": np.arange(3.0), "settings": object()}

    def model(x, sigma, cond, table, settings):
        assert table is shared["table"] and settings is shared["settings"]
        return 0.1 * x + cond[:, :, None, None] * float(table[1])

    wrapped = kdpp.TeacherGuidedDenoiser(model, model, teacher_steps=0)
    found = run(EULER, wrapped, seeded(BATCH, *problems.SHAPE, seed=5), karras(3),
                extra_args={**EXTRA, **shared})  # fmt: skip
    assert found.isfinite().all()


def test_a_cap_holds_for_a_guidance_conditioned_model():
    """It has no halves of its own to see to, so its batch can be split."""
    rows = []

    def network(x, sigma, cond, w):
        rows.append(len(x))
        return 0.1 * x + cond[:, :, None, None] + w.view(-1, 1, 1, 1)

    model = kdpp.GuidanceConditioned(network)
    extra = {**EXTRA, "cond_scale": 3.0}
    capped = kdpp.TeacherGuidedDenoiser(model, model, teacher_steps=0, max_batch=2)
    x = seeded(BATCH, *problems.SHAPE, seed=5)
    found = run(EULER, capped, x, karras(2), extra_args=extra)
    assert max(rows) == 2
    whole = kdpp.TeacherGuidedDenoiser(model, model, teacher_steps=0)
    assert torch.allclose(found, run(EULER, whole, x, karras(2), extra_args=extra), atol=1e-12)


def test_own_cfg_takes_a_denoiser():
    with pytest.raises(TypeError, match=r"OwnCFG takes a denoiser.*None"):
        kdpp.OwnCFG(None)


# ------------------------------------------------------------------------------- stacked teachers


class Net(nn.Module):
    """A small trainable denoiser with a condition, a buffer and a branch-free forward."""

    def __init__(self, seed, width=5):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Linear(12 + 3 + 1, width), nn.Linear(width, 12)
        self.register_buffer("gain", torch.tensor(0.1 * (seed + 1)))

    def forward(self, x, sigma, cond):
        """An estimate of x0 from all pixels, the level and the condition."""
        seen = torch.cat([x.flatten(1) / (1 + sigma[:, None]), cond, sigma.log()[:, None]], 1)
        return (self.two(self.one(seen).tanh()) * self.gain).view_as(x)


def nets(count=3, **sizes):
    return [Net(seed, **sizes).double() for seed in range(count)]


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("draws", [1, 2])
@over_solvers
def test_stacked_teachers_speak_as_they_do_alone(solver, draws, cfg_scale, monkeypatch):
    """One call for all where all speak with as many rows; the image that separate calls give."""
    originals = nets()

    def teachers(denoisers):
        return [
            Teacher(one, scale=0.1 * (j + 1), cfg_scale=cfg_scale, draws=draws, steps=j + 1)
            for j, one in enumerate(denoisers)
        ]

    expected = sample(guided(mixture(0), teachers(originals)), solver, steps=5)
    stacked = kdpp.stack_teachers(*originals)
    calls = []
    for kind in (kdpp.stacking.Stack, kdpp.stacking.Stacked):
        forward = kind.forward

        def counted(self, x, *args, _forward=forward, **kwargs):
            calls.append((type(self).__name__, len(x)))
            return _forward(self, x, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    found = sample(guided(mixture(0), teachers(stacked)), solver, steps=5)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    rows = BATCH * draws * (1 if cfg_scale == 1.0 else 2)
    # All three at the first step, two at the second, the third alone at the third.
    assert calls == [("Stack", 3 * rows)] + [("Stacked", rows)] * 3


def test_a_stack_holds_its_weights_once():
    """The members share the stack's tensors; moving one moves all; nothing trains by accident."""
    stacked = kdpp.stack_teachers(*nets())
    model = guided(mixture(0), [Teacher(one) for one in stacked])
    held = [t for t in [*model.parameters(), *model.buffers()] if t.shape[:1] == (3,)]
    per_net = len(list(Net(0).parameters())) + len(list(Net(0).buffers()))
    assert len({t.data_ptr() for t in held}) == per_net
    assert all(one.stack is stacked[0].stack for one in stacked)


def test_a_cap_below_the_stack_asks_the_members_apart():
    """The cap holds for stacked teachers too."""
    originals = nets(2)
    settings = {"cfg_scale": 1.0, "scale": 0.3}
    expected = sample(guided(mixture(0), [Teacher(one, **settings) for one in originals]))
    stacked = [Teacher(one, **settings) for one in kdpp.stack_teachers(*originals)]
    found = sample(guided(mixture(0), stacked, max_batch=4))
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


def test_what_cannot_be_stacked_is_refused():
    """One network, other classes, other sizes, no networks."""
    with pytest.raises(ValueError, match="two or more"):
        kdpp.stack_teachers(Net(0))
    with pytest.raises(TypeError, match="one class"):
        kdpp.stack_teachers(Net(0), mixture(1))
    with pytest.raises(TypeError, match="one class"):
        kdpp.stack_teachers(lambda x, sigma: x, lambda x, sigma: x)
    with pytest.raises(ValueError, match="one architecture"):
        kdpp.stack_teachers(Net(0), Net(1, width=6))
    with pytest.raises(TypeError, match="borrowed"):
        kdpp.stack_teachers(*(kdpp.Borrowed(Net(j), device="cpu") for j in range(2)))


class Activated(Net):
    """A network with settings, an activation and whatever else."""

    def __init__(self, seed=0, act=None, **settings):
        super().__init__(seed)
        self.act = nn.ReLU() if act is None else act
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, x, sigma, cond=None):
        """The activation of what the network says."""
        return self.act(super().forward(x, sigma, cond))


def times(factor):
    return lambda x: x * factor


class Scaled:
    """An activation that is no module and has no ``==``."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        """Times a factor."""
        return x * self.factor


class Slotted:
    """The same without a ``__dict__``."""

    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor


def keyed(factor):
    def times(x, *, factor=factor):
        return x * factor

    return times


class Tied(nn.Module):
    """Two weights that are one, or not."""

    def __init__(self, tied):
        super().__init__()
        self.a = nn.Parameter(torch.ones(2))
        self.b = self.a if tied else nn.Parameter(torch.ones(2))


DTYPES = (torch.float16, torch.float32)


def dropout(p, training):
    return nn.Dropout(p).train(bool(training))


DIFFERENT = {
    "a float": ("time_scale", lambda: [kdpp.FlowDenoiser(Net(0), t) for t in (1.0, 1e3)]),
    "a float inside": ("negative_slope", lambda: [Activated(0, nn.LeakyReLU(s)) for s in (1, 2)]),
    "a class": ("act is a ReLU and a Tanh", lambda: [Activated(0), Activated(1, nn.Tanh())]),
    "a function": ("act is ", lambda: [Activated(0, torch.relu), Activated(0, torch.tanh)]),
    "what a function holds": ("act", lambda: [Activated(0, times(2)), Activated(0, times(3))]),
    "a partial's": ("min", lambda: [Activated(0, partial(torch.clamp, min=m)) for m in (0, 1)]),
    "an object's": ("act.factor is 2 and 3", lambda: [Activated(0, Scaled(f)) for f in (2, 3)]),
    "a method's": ("act", lambda: [Activated(0, Scaled(f).__call__) for f in (2, 3)]),
    "a dtype": (r"torch\.float16 tensor", lambda: [Activated(0), Activated(1).half()]),
    "a plain tensor": ("table", lambda: [Activated(0, table=torch.ones(2) * j) for j in (1, 2)]),
    "a table's length": ("table", lambda: [Activated(0, table=torch.ones(n)) for n in (1, 2)]),
    "a nested list": (r"rates\[1\]", lambda: [Activated(0, rates=[1, {"b": b}]) for b in "cd"]),
    "a list's length": (r"rates has \[1\]", lambda: [Activated(0, rates=[1] * n) for n in (1, 2)]),
    "a word": ("mode is 'a' and 'b'", lambda: [Activated(0, mode="a"), Activated(0, mode="b")]),
    "a layer more": ("more in one", lambda: [Activated(0), Activated(0, more=nn.Linear(2, 2))]),
    "a bias": ("bias is ", lambda: [nn.Linear(2, 2), nn.Linear(2, 2, bias=False)]),
    "a size": ("one.out_features is 5 and 6", lambda: [Net(0), Net(1, width=6)]),
    "dropout's flag": ("act.training", lambda: [Activated(0, dropout(0.1, t)) for t in (1, 0)]),
    "a number's dtype": ("dtype is ", lambda: [Activated(0, dtype=d) for d in DTYPES]),
    "an operator": ("act is ", lambda: [Activated(0, itemgetter(j)) for j in (0, 1)]),
    "an object's slots": ("act is ", lambda: [Activated(0, Slotted(f)) for f in (2, 3)]),
    "a keyword's default": ("act.__kwdefaults__", lambda: [Activated(0, keyed(f)) for f in (2, 3)]),
    "a name that steers": ("name is 'a' and 'b'", lambda: [Activated(0, name=n) for n in "ab"]),
    "tied weights": ("shared weights", lambda: [Tied(False), Tied(True)]),
    "tied weights first": ("shared weights", lambda: [Tied(True), Tied(False)]),
    "a third": ("1 and 3 .* act is", lambda: [Activated(0), Activated(1), Activated(2, nn.Tanh())]),
}  # fmt: skip


@pytest.mark.parametrize(("where", "make"), DIFFERENT.values(), ids=DIFFERENT)
def test_networks_that_differ_in_more_than_weights_are_no_stack(where, make):
    """The stack would act as the first; the message says where they differ."""
    with pytest.raises(ValueError, match=rf"architecture: .*{where}|denoisers {where}"):
        kdpp.stack_teachers(*make())


def itself():
    """A network with attributes that lead back to it."""
    made = Activated(0)
    made.back = [made, {"again": made}]
    made.method = made.one.extra_repr
    return made


def hooked():
    made = Activated(0)
    made.register_forward_hook(lambda *_: None)
    made.one.register_forward_pre_hook(lambda *_: None)
    return made


ALIKE = {
    "training flags": lambda: [Activated(0).train(), Activated(1).eval()],
    "dropout of nothing": lambda: [Activated(0, dropout(0.0, t)) for t in (1, 0)],
    "frozen weights": lambda: [Activated(0).requires_grad_(False), Activated(1)],
    "hooks": lambda: [Activated(0), hooked()],
    "names": lambda: [Activated(0, _name_or_path=n, config={"_version": n}) for n in "ab"],
    "nan": lambda: [Activated(0, floor=float("nan")) for _ in range(2)],
    "1 and 1.0": lambda: [Activated(0, rates=[1, 2]), Activated(0, rates=(1.0, 2.0))],
    "functions of one line": lambda: [Activated(0, times(2)), Activated(1, times(2))],
    "objects": lambda: [Activated(0, Scaled(2)), Activated(1, Scaled(2))],
    "tensors": lambda: [Activated(0, table=torch.ones(2)) for _ in range(2)],
    "generators": lambda: [Activated(0, source=torch.Generator()) for _ in range(2)],
    "circles": lambda: [itself(), itself()],
    "flow models": lambda: [kdpp.FlowDenoiser(Net(j), 1000) for j in range(2)],
}  # fmt: skip


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
def test_what_does_not_change_an_answer_may_differ(make):
    """No false alarm; each member answers as the network it was made of."""
    denoisers = make()
    stacked = kdpp.stack_teachers(*denoisers)
    x = seeded(2, *problems.SHAPE, seed=1).float()
    cond = seeded(2, 3, seed=2).float()
    for one, member in zip(denoisers, stacked):
        found, expected = (net(x, torch.ones(2), cond=cond) for net in (member, one))
        assert torch.allclose(found, expected, atol=1e-6)


def test_networks_of_diffusers_can_be_stacked(tmp_path):
    """One made, one read from a file: notes of where a network comes from make no difference."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")

    def make(**settings):
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
            block_out_channels=(8,), down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",), **settings,
        )  # fmt: skip

    make().save_pretrained(tmp_path)
    read = diffusers.UNet2DModel.from_pretrained(tmp_path)
    kdpp.stack_teachers(make(), read)
    with pytest.raises(ValueError, match=r"act_fn.* is 'silu' and 'gelu'"):
        kdpp.stack_teachers(read, make(act_fn="gelu"))


def test_marked_models_are_not_stacked():
    """A stack's CFG is kdpp's; theirs is their own."""
    with pytest.raises(TypeError, match="OwnCFG, which does its own CFG"):
        kdpp.stack_teachers(*(kdpp.OwnCFG(Net(j)) for j in range(2)))


def test_stacked_flow_models_are_flow_models():
    """As teachers of a flow student: the image that separate flow teachers give."""

    def flow(seed):
        return kdpp.FlowDenoiser(Net(seed).double())

    def sampled(denoisers):
        student = kdpp.FlowDenoiser(lambda x, t, cond=None: 0.3 * x)
        teachers = [Teacher(one, scale=0.2, cfg_scale=1.0) for one in denoisers]
        x = seeded(BATCH, *problems.SHAPE, seed=5)
        taus = torch.tensor([1.0, 0.7, 0.3, 0.0], dtype=torch.float64)
        model = guided(student, teachers)
        return kdpp.sample_euler_tg(model, x, taus, {"cond": EXTRA["cond"]}, disable=True)

    stacked = kdpp.stack_teachers(flow(0), flow(1))
    assert all(one.flow is True for one in stacked)
    assert not any(one.flow for one in kdpp.stack_teachers(*nets(2)))
    assert torch.allclose(sampled(stacked), sampled([flow(0), flow(1)]), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="both be flow models"):
        guided(mixture(0), [Teacher(one) for one in stacked])


def test_stacked_models_tell_their_own_ranges():
    """Each that of the network it was made of."""

    def ranged(seed, top):
        net = Net(seed)
        net.register_buffer("sigma_min", torch.tensor(0.1))
        net.register_buffer("sigma_max", torch.tensor(top))
        return net

    stacked = kdpp.stack_teachers(ranged(0, 10.0), ranged(1, 20.0))
    assert [(one.sigma_min, one.sigma_max) for one in stacked] == [
        (pytest.approx(0.1), 10.0), (pytest.approx(0.1), 20.0),
    ]  # fmt: skip


def test_a_k_diffusion_denoiser_can_be_stacked():
    """CompVisDenoiser looks its timesteps up in a table; stacked it gives the same answers."""
    from kdpp.digits import load_teacher

    make = kdpp.kdiffusion.external.CompVisDenoiser
    one, two = load_teacher(), load_teacher()
    with torch.no_grad():
        two.leave.weight.mul_(0.9)
    stacked = kdpp.stack_teachers(make(one), make(two))
    x, cond = torch.randn(4, 1, 8, 8), torch.arange(4)
    sigma = torch.tensor([0.1, 1.0, 3.0, 14.0])
    with torch.no_grad():
        expected = torch.cat([make(net)(x, sigma, cond=cond) for net in (one, two)])
        twice = [torch.cat([tensor, tensor]) for tensor in (x, sigma, cond)]
        both = stacked[0].stack(*twice[:2], cond=Rows(twice[2]))
        alone = torch.cat([net(x, sigma, cond=cond) for net in stacked])
    assert torch.allclose(both, expected, atol=1e-4)
    assert torch.allclose(alone, expected, atol=1e-6)


# ------------------------------------------------------------------------------- borrowed teachers


class Borrowed(kdpp.Borrowed):
    """A teacher that notes when it is fetched, called and released."""

    def __init__(self, name, log, fails=False):
        super().__init__(mixture(1), device="cpu")
        self.name, self.log, self.fails = name, log, fails

    def fetch(self):
        self.log.append(f"fetch {self.name}")

    def release(self):
        self.log.append(f"release {self.name}")

    def forward(self, x, sigma, cond=None):
        """Half of x."""
        self.log.append(self.name)
        if self.fails:
            raise RuntimeError("broken")
        return x / 2


def test_borrowed_teachers_are_there_for_their_steps_only():
    """Fetched before the student's call of their first step, released after their last."""
    log = []

    def student(x, sigma, cond=None):
        log.append("student")
        return x / 3

    settings = {"cfg_scale": 1.0, "scale": 0.2}
    teachers = [
        Teacher(Borrowed("a", log), steps=[0, 2], **settings),
        Teacher(Borrowed("b", log), steps=[1], **settings),
    ]
    sample(guided(student, teachers), steps=5, extra={})
    assert [entry for entry in log if not entry.startswith("release")] == [
        "fetch a", "student", "a", "fetch b", "student", "b", "student", "a", "student", "student",
    ]  # fmt: skip
    assert log[5:7] == ["b", "release b"] and log[8:10] == ["a", "release a"]


def test_a_network_borrowed_by_two_teachers_comes_once():
    """Fetched at the first's first step and released after the other's last."""
    log = []
    shared = Borrowed("a", log)
    teachers = [
        Teacher(shared, steps=[0], cfg_scale=1.0, scale=0.2),
        Teacher(shared, steps=[2], cfg_scale=1.0, scale=0.2),
    ]
    sample(guided(lambda x, sigma, cond=None: x / 3, teachers), steps=4, extra={})
    assert log == ["fetch a", "a", "a", "release a", "release a"]  # again when the run is over


def test_borrowed_teachers_go_back_when_a_run_breaks():
    """Also those that were fetched and not yet heard."""
    log = []
    teachers = [
        Teacher(Borrowed("a", log, fails=True), cfg_scale=1.0),
        Teacher(Borrowed("b", log), cfg_scale=1.0),
    ]
    with pytest.raises(RuntimeError, match="broken"):
        sample(guided(lambda x, sigma, cond=None: x / 3, teachers), extra={})
    assert {"release a", "release b"} <= set(log)


# ------------------------------------------------------------------------------- noise by numbers


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s.stochastic], ids=lambda s: s.name)
def test_a_noise_sampler_that_takes_numbers_gets_numbers(solver):
    """Its method ``between`` is asked, with Python floats equal to what tensors would have held."""
    tensors, numbers = [], []

    class Source:
        def __call__(self, sigma, sigma_next):
            tensors.append((float(sigma), float(sigma_next)))
            return seeded(2, *problems.SHAPE, seed=len(tensors))

    class ByNumbers(Source):
        def between(self, sigma, sigma_next):
            assert type(sigma) is type(sigma_next) is float
            numbers.append((sigma, sigma_next))
            return seeded(2, *problems.SHAPE, seed=len(numbers))

    problem, sigmas = Problem(), karras(4)
    x = problem.start(sigmas)
    extra, sources = problem.extra_args, (Source(), ByNumbers())
    images = [
        run(solver, problem.guided(), x, sigmas, extra_args=extra, noise_sampler=source)
        for source in sources
    ]
    assert torch.equal(*images)
    assert len(numbers) == len(tensors)
    for found, expected in zip(numbers, tensors):
        assert found == pytest.approx(expected, rel=1e-12)
