"""kdpp tune: known answers where data are Gaussian, and the shipped pair on fresh seeds."""

import argparse
import json
import math
import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

import kdpp
import problems
from kdpp.digits import load_classifier, load_data, load_student, load_teacher
from kdpp.digits.metrics import features_of
from kdpp.lab import answer, files
from kdpp.lab import looks as measured
from kdpp.lab import tune as module
from kdpp.lab import tuning as search
from kdpp.lab.diffusion import cfg
from kdpp.lab.metrics import frechet_distance
from kdpp.lab.schedules import SCHEDULE, schedule
from kdpp.lab.tuning import tune

MEAN, VARIANCE = 0.3, 0.25
LEVELS = (5.0, 1.0, 0.4, 0.0)


def level(sigma, x):
    return sigma.view(-1, *[1] * (x.ndim - 1))


def teacher(x, sigma, cond=0.0, shift=0.0):
    """The denoiser of N(MEAN + cond, VARIANCE): exact."""
    noise = level(sigma, x) ** 2
    return (VARIANCE * x + noise * (MEAN + cond)) / (VARIANCE + noise)


def path(x, sigma, sigma_next):
    """Where the teacher's ODE goes, in closed form."""
    now, then = (VARIANCE + level(s, x) ** 2 for s in (sigma, sigma_next))
    return MEAN + (x - MEAN) * (then / now).sqrt()


def endpoint(x, sigma, cond=0.0):
    return path(x, sigma, torch.zeros_like(sigma))


def starts(count, *shape, seed=0):
    """States of the data at the first level."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return MEAN + math.sqrt(VARIANCE + LEVELS[0] ** 2) * noise


def replay(noise):
    """A noise sampler that gives these, one after the other."""
    draws = iter(noise)
    return lambda *_: next(draws)


def looked(tuning, **wanted):
    """The looks with these attributes."""
    return [look for look in tuning.looks if all(getattr(look, k) == v for k, v in wanted.items())]


BIAS, SHRUNK = 0.5, 0.7


def biased(x, sigma):
    return endpoint(x, sigma) + BIAS


def shrunken(x, sigma):
    return MEAN + SHRUNK * (endpoint(x, sigma) - MEAN)


def optimum_of_biased(s):
    """λ* and R² at the first step, from the moments of Gaussian a - MEAN and of fresh noise."""
    square = s**2 * (VARIANCE + BIAS**2) + VARIANCE**2
    return BIAS**2 * (VARIANCE + s**2) / square, s**2 * BIAS**2 / square


def optimum_of_shrunken(s):
    square = s**2 * SHRUNK**2 * VARIANCE + VARIANCE**2
    scale = -SHRUNK * (1 - SHRUNK) * VARIANCE * (VARIANCE + s**2) / square
    return scale, SHRUNK**2 * VARIANCE * s**2 / square


@pytest.mark.parametrize(
    ("student", "optimum"), [(biased, optimum_of_biased), (shrunken, optimum_of_shrunken)]
)
def test_the_known_optimum_is_found(student, optimum):
    """Least squares gives the λ* and R² that the moments give, at every level, also below 0."""
    tuning = tune(student, teacher, starts(200, 64), LEVELS, sampler=kdpp.sample_lcm_tg, detail=500)
    looks = looked(tuning, by="teacher", step=0, renoise_eta=1.0)
    assert [look.renoise for look in looks] == [5.0, 1.0, 0.3, 0.2]
    for look in looks:
        scale, explained = optimum(look.renoise)
        assert look.low < scale < look.high
        assert look.high - look.low < 0.2
        assert look.explained == pytest.approx(explained, abs=0.03)


def test_a_biased_student_is_to_be_guided():
    """The verdict, its settings and its code do on fresh samples what they promise."""
    tuning = tune(biased, teacher, starts(100, 64), LEVELS, sampler=kdpp.sample_lcm_tg)
    assert tuning.guide and tuning.check.change.counts and tuning.check.own.high < 0.0
    assert tuning.cost == measured.Price(3, 1, None)
    x = starts(400, 64, seed=1)
    model = eval(
        tuning.code.removeprefix("model = "),
        {"kdpp": kdpp, "student": biased, "teacher": teacher},
    )
    sigmas = torch.tensor(LEVELS)
    alone = kdpp.TeacherGuidedDenoiser(biased, teacher, teacher_steps=0)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2, 400, 64, generator=generator, dtype=torch.float64)
    pictures = [
        kdpp.sample_lcm_tg(one, x, sigmas, disable=True, noise_sampler=replay(noise))
        for one in (model, alone)
    ]
    perfect = x
    for sigma, after, n in zip(LEVELS, LEVELS[1:], (*noise, 0.0)):
        perfect = endpoint(perfect, torch.tensor([sigma])) + after * n
    guided, plain = ((one - perfect).square().flatten(1).mean(1) for one in pictures)
    promised = tuning.check.change
    change = float((guided - plain).mean() / plain.mean())
    assert change == pytest.approx(promised.mean, abs=0.05) and change < -0.2


@pytest.mark.parametrize("seed", [0, 1])
def test_a_gain_that_fresh_samples_do_not_have_is_none(seed):
    """Where the half that chooses, by the seed, gains and the other does not, the verdict is no."""
    chooses = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:30]
    off = torch.zeros(60, 1).index_fill(0, chooses, BIAS)

    def student(x, sigma, off):
        return endpoint(x, sigma) + off

    def other(x, sigma, off):
        return teacher(x, sigma)

    tuning = tune(
        student, other, starts(60, 64), LEVELS, {"off": off}, sampler=kdpp.sample_lcm_tg, seed=seed
    )
    assert any(trial.change.counts and trial.own.high < 0.0 for trial in tuning.trials)
    assert not tuning.guide and not tuning.check.change.counts


def test_what_is_said_of_a_negative_scale():
    """A student that is pulled to the mean gains by a push away: λ < 0, and the code says so."""
    tuning = tune(shrunken, teacher, starts(60, 64), LEVELS, sampler=kdpp.sample_lcm_tg)
    (look,) = looked(tuning, by="teacher", step=2, renoise=0.2, renoise_eta=1.0)
    assert look.high < 0.0 and look.settings["extrapolate"] is True
    model = kdpp.TeacherGuidedDenoiser(shrunken, teacher, **look.settings)
    assert model.teachers[0].scale == round(look.scale, 3) < 0.0


def follower(x, sigma):
    """Under Euler on LEVELS this student stays on the teacher's path."""
    after = torch.tensor(LEVELS)[[LEVELS.index(s) + 1 for s in sigma.tolist()]]
    ratio = level(after / sigma, x)
    return (path(x, sigma, after) - ratio * x) / (1 - ratio)


def anywhere(x, sigma):
    """`follower`, and where it knows no next level the path's end."""
    known = all(s in LEVELS for s in sigma.tolist())
    return follower(x, sigma) if known else endpoint(x, sigma)


@pytest.mark.parametrize(
    ("student", "sampler"),
    [(endpoint, kdpp.sample_lcm_tg), (anywhere, kdpp.sample_euler_tg)],
)
def test_a_converged_student_is_not_to_be_guided(student, sampler):
    """A student that does what the teacher's many steps do, for its sampler, misses nothing."""
    tuning = tune(student, teacher, starts(60, 16), LEVELS, sampler=sampler)
    assert not tuning.guide and tuning.by is None
    assert tuning.settings == {"teacher_steps": 0} and tuning.cost is None
    assert tuning.distance < 1e-4
    assert tuning.verdict.startswith("Do not guide")
    # And one that is far from the path's end does, under the sampler it is not made for.
    other = {kdpp.sample_lcm_tg: kdpp.sample_euler_tg, kdpp.sample_euler_tg: kdpp.sample_lcm_tg}
    assert tune(student, teacher, starts(60, 16), LEVELS, sampler=other[sampler]).distance > 1e-2


def test_a_second_look_of_its_own_is_told_apart():
    """Where the student is the teacher, no teacher is needed: its own second look does the same."""

    def same(x, sigma):
        return teacher(x, sigma)

    tuning = tune(same, teacher, starts(60, 64), LEVELS, sampler=kdpp.sample_lcm_tg)
    assert tuning.trials and not tuning.guide
    assert abs(tuning.check.own.mean) < 0.05


def test_a_student_that_misses_nothing_is_no_division_by_zero():
    """All sums 0, or a look that says what the student says: λ* and R² are 0, not NaN."""
    zeros, ones = torch.zeros(20, 3), torch.ones(20, 3)
    for uv, vv, ee in (
        (zeros, zeros, zeros),
        (zeros, ones, zeros),
        (1e-4 * ones, 1e-8 * ones, ones),
    ):
        assert all(torch.equal(value, zeros[0]) for value in measured.fitted(uv, vv, ee, 0.95))
    scale, low, high, explained = measured.fitted(ones, 2 * ones, ones, 0.95)
    assert torch.equal(scale, 0.5 * ones[0]) and torch.equal(explained, 0.5 * ones[0])
    assert torch.equal(low, scale) and torch.equal(high, scale)


def trial(step, change, itself=0.0, variance=0.1):
    """A trial of this mean change, each interval 0.02 wide, of pictures that far apart."""
    look = measured.Look("teacher", step, 1.0, 0.3, 0.0, 1.0, scale=0.5)

    def made(mean):
        return measured.Change(mean, mean - 0.01, mean + 0.01, mean * variance)

    changes = map(made, (change, itself, change - itself))
    return measured.Trial(look, measured.replace(look, by="student"), *changes)


def test_which_step_is_chosen():
    """The one that gains most; under a sampler with noise the latest that gains half of that; not
    where the student itself does as much, unless there is no other."""
    trials = [trial(0, -0.5), trial(1, -0.4), trial(2, -0.26), trial(3, -0.2)]
    assert search._choose(trials, renewed=False).look.step == 0
    assert search._choose(trials, renewed=True).look.step == 2
    trials[0] = trial(0, -0.5, itself=-0.495)
    assert search._choose(trials, renewed=False).look.step == 1
    assert search._choose(trials, renewed=True).look.step == 3
    assert search._choose([trials[0], trial(1, -0.001)], renewed=True).look.step == 0
    assert search._choose([trial(0, -0.02), trial(1, 0.0, itself=-0.3)], True).look.step == 1


def test_what_is_judged_of_it():
    """Guide if the gain is sure and visible; else say what there is instead."""
    for check, by, words in (
        (trial(0, -0.5, itself=-0.4), "teacher", "-50.0 %"),
        (trial(0, -0.4, itself=-0.5), "student", "own look it changes by -50.0 %"),
        (trial(0, -0.4, itself=-0.5, variance=0.005), None, "a gain below 0.3 % cannot be seen"),
        (trial(0, -0.005), None, "no gain is sure"),
        (trial(0, 0.2), None, "no gain is sure"),
        (None, None, "no look surely explains 5 %"),
    ):
        found, reason = search._judge(check)
        assert found == by and words in reason


def test_more_own_steps_are_a_control():
    """Where these gain as much, or a second look of its own does, the teacher is not asked; where
    their gain is not sure, or less, it is."""
    check = trial(0, -0.5, itself=-0.1)

    def longer(mean, over, reach=0.01):
        made = measured.Change(mean, mean - reach, mean + reach, 0.1 * mean)
        return measured.Longer((5.0, 1.0, 0.0), made, measured.Change(over, over, over, over))

    assert search._judge(check, longer(-0.6, 0.1))[0] == "steps"
    assert "of 2 steps of the student alone it changes by -60.0 %" in search._judge(
        check, longer(-0.6, 0.1))[1]  # fmt: skip
    assert search._judge(check, longer(-0.4, -0.1))[0] == "teacher"
    assert search._judge(check, longer(-0.6, 0.1, reach=0.7))[0] == "teacher"
    assert search._judge(trial(0, -0.5, itself=-0.495), longer(-0.1, -0.4))[0] == "student"


def test_more_own_steps_are_measured():
    """A student that is right at the levels of one more step only, where it misses nothing."""

    def student(x, sigma):
        right = torch.isin(level(sigma, x), torch.tensor(longer))
        return endpoint(x, sigma) + BIAS * ~right * torch.sin(20 * x)

    levels, longer = torch.tensor([5.0, 1.0, 0.6, 0.0]), (5.0, 1.0, 0.4, 0.25, 0.0)
    given = {"sampler": kdpp.sample_lcm_tg, "longer": lambda steps: longer[: steps + 1]}
    tuning = tune(student, teacher, starts(60, 64), levels, **given)
    assert tuning.by == "steps" and tuning.longer.levels == pytest.approx(longer)
    assert tuning.longer.change.mean == pytest.approx(-1.0, abs=0.01)
    # Every distance is below the unguided ones' quantile, so that changes add up.
    assert tuning.longer.over.mean == pytest.approx(
        tuning.check.change.mean - tuning.longer.change.mean, abs=1e-6
    )
    assert tuning.settings == {"teacher_steps": 0} and tuning.cost is None
    assert tuning.verdict.startswith("Do not ask the teacher: 4 steps of the student's own")
    assert tuning.code == "sigmas = torch.tensor([5, 1, 0.4, 0.25, 0])"
    # Without being told, more steps lie between those given.
    del given["longer"]
    between = tune(student, teacher, starts(60, 64), levels, **given).longer.levels
    assert len(between) == 5 and between[0] == 5.0 and between[-1] == 0.0


def test_a_picture_that_became_another_counts_once():
    """Distances count up to the unguided ones' 90 % quantile: one far picture changes little."""
    perfect = torch.linspace(-1.0, 1.0, 50).view(50, 1)
    plain = perfect + 0.1
    plain[7] = 40.0
    far = measured.distances(plain, perfect, None)
    near = measured.distances(perfect + 0.05, perfect, None)
    found = measured.Distances(far, perfect, None)
    assert found.plain.max() == pytest.approx(0.01, rel=1e-4)
    change = found.trial(trial(0, 0).look, trial(0, 0).itself, near, far).change
    assert change.mean == pytest.approx(-0.75, abs=1e-4)
    assert change.of_variance == pytest.approx(-0.0075 / float(perfect.var()), rel=1e-3)
    clamped = measured.distances(plain, perfect, (-1.0, 1.0))
    assert (
        clamped[7] == pytest.approx(float(1.0 - perfect[7]) ** 2) and clamped[-1] == 0.0 < far[-1]
    )


def test_intervals_are_for_all_looks_together():
    """With m looks each interval is at 1 - 0.05/m, by Student's t (Bonferroni)."""
    from scipy.stats import t

    generator = torch.Generator().manual_seed(0)
    sums = torch.rand(30, 8, 3, generator=generator, dtype=torch.float64) + 0.5
    looks = [measured.Look("teacher", 0, 1.0, 0.3, 1.0, w) for w in range(8)]
    found = measured.estimates(looks, sums)
    _, low, high = measured.jackknife(sums[..., 0], sums[..., 1], 0.95)
    wider = t.ppf(1 - 0.025 / 8, 29) / t.ppf(0.975, 29)
    for look, a, b in zip(found, low.tolist(), high.tolist(), strict=True):
        assert look.high - look.low == pytest.approx(wider * (b - a))


def test_intervals_hold_what_they_promise():
    """The jackknife's interval holds the true ratio in 95 of 100 cases, with heavy tails too."""
    generator = torch.Generator().manual_seed(0)
    below = torch.randn(50, 4000, generator=generator, dtype=torch.float64).exp()
    noise = torch.randn(50, 4000, generator=generator, dtype=torch.float64)
    mean, low, high = measured.jackknife(0.3 * below + below * noise, below, 0.95)
    held = float(((low < 0.3) & (high > 0.3)).double().mean())
    assert 0.92 < held < 0.97
    assert float((mean - 0.3).abs().mean()) < 0.2


SOLVERS = {one.name: one for one in problems.on_schedules(kdpp.SOLVERS)}


CLASSLESS = {"cond": torch.zeros(20, 1), "uncond": torch.zeros(20, 1)}


def forgets(solver):
    """Whether its steps start anew from the estimate, as multistep random's do."""
    return all(step.stages[-1].row.target == 0.0 for step in solver.plan([4.0, 2.0, 1.0]))


OFF_THE_ODE = {"dpmpp_2s_ancestral_cfg_pp_mixed", "cfgpp_ud10_ab"}
"""Forms of ComfyUI's that go nowhere as steps shrink (docs/solvers.md)."""


def part_of(student, sampler, levels):
    pair = measured.Pair(student, teacher, sampler, levels, CLASSLESS, 1.0, 50, None)
    return pair, pair.half(starts(20, 4).float(), torch.arange(20), torch.arange(20))


@pytest.mark.parametrize(
    "name", [n for n, one in SOLVERS.items() if not forgets(one) and n not in OFF_THE_ODE]
)
def test_the_teachers_run_is_the_samplers_limit(name):
    """With more steps the sampler's run of the teacher goes where Φ and the noise go: σ_down and
    the noise are read off rightly. (LCM's own steps go to the end of the path: no limit.) With 12
    steps some errors are small by chance: of opposite signs at both ends of the path."""
    errors = []
    for steps in (12, 48, 192):
        angles = torch.linspace(math.atan(5.0), 0.0, steps + 1, dtype=torch.float64)
        levels = [5.0, *angles.tan().tolist()[1:-1], 0.0]
        _, part = part_of(teacher, SOLVERS[name].sample, levels)
        perfect = part.perfect()
        assert float(perfect.std()) == pytest.approx(math.sqrt(VARIANCE), rel=0.2)
        errors.append(float((part.plain() - perfect).square().mean().sqrt()))
    assert errors[-1] < 0.2 and errors[-1] < 0.6 * max(errors)


@pytest.mark.parametrize("name", SOLVERS)
def test_looks_and_revisions_in_every_sampler(name):
    """Looks that none hears leave every bit; a look that is heard moves the state by the gain."""
    pair, part = part_of(biased_of(teacher), SOLVERS[name].sample, LEVELS)
    looks = measured.possible_looks(pair, (0.3,))
    plain = part.plain()
    assert torch.equal(part.study(looks).plain, plain)
    (look,) = [k for k in looks if k.place == (1, 0.3, 0.0) and k.by == "teacher"]
    heard = pair.model(pair.student, teacher, **look.settings | {"teacher_scale": 0.5})
    deaf = pair.model(pair.student, teacher, teacher_steps=0)
    told, untold = (part.sample(model, part.x) for model in (heard, deaf))
    d = told[1]["denoised_teacher"] - told[1]["denoised_student"]
    moved = told[2]["x"] - untold[2]["x"]
    torch.testing.assert_close(moved, 0.5 * pair.moves[1].gain * d, rtol=1e-3, atol=1e-5)
    assert float(moved.abs().mean()) > 1e-3


def biased_of(model):
    def student(x, sigma, cond=0.0):
        return model(x, sigma, cond) + BIAS

    return student


def test_moves_in_closed_form():
    """σ_down/σ and the weight of a revision, from the papers' formulas."""

    def moves(sampler):
        pair = measured.Pair(teacher, teacher, sampler, LEVELS, {}, 1.0, 50, None)
        return [tuple(move) for move in pair.moves]

    assert moves(kdpp.sample_lcm_tg) == [(0.0, 1.0)] * 3
    assert sum(moves(kdpp.sample_euler_tg), ()) == pytest.approx((0.2, 1.0, 0.4, 1.0, 0.0, 1.0))
    ancestral = moves(kdpp.sample_euler_ancestral_tg)
    assert ancestral[0] == pytest.approx((1.0 / 25.0, 1.0))  # σ_down = σ'²/σ
    singlestep = moves(kdpp.sample_dpmpp_2s_ancestral_tg)
    assert singlestep[0] == pytest.approx((1.0 / 25.0, 1.0 - 1.0 / 25.0))  # (1 - e^{-h})/(2r)


class Counted(torch.nn.Module):
    """The teacher under a shift, for CFG; it counts samples, a half of CFG as one."""

    def __init__(self, bias):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.full((3,), bias), requires_grad=False)
        self.calls = 0

    def forward(self, x, sigma, cond):
        self.calls += len(x)
        return teacher(x, sigma, cond) + self.bias[0]


@pytest.mark.parametrize("sampler", [kdpp.sample_lcm_tg, kdpp.sample_dpmpp_2s_ancestral_tg])
def test_evaluations_are_counted_and_announced(sampler, capsys):
    """What it says that it took is what the networks did, and at most what it announced."""
    student, other = Counted(BIAS), Counted(0.0)
    extra_args = {"cond": torch.full((24, 1), 0.1), "uncond": torch.zeros(24, 1), "cond_scale": 1.5}
    tuning = tune(student, other, starts(24, 16), LEVELS, extra_args, sampler=sampler,
                  teacher_cfg_scale=2.0, progress=True)  # fmt: skip
    assert tuning.evaluations == (student.calls, other.calls)
    said = capsys.readouterr().out.replace(",", "")
    announced = [int(n) for n in re.findall(r"(\d+)(?: evaluations of the student| of the teach)",
                                            said)]  # fmt: skip
    for most, done in zip(announced, tuning.evaluations, strict=True):
        assert done <= most <= 1.35 * done
    assert tuning.cost is None or tuning.cost.compute > 1.0


@pytest.mark.parametrize(("scale", "sampler", "each"), [(1.0, "euler", 1), (3.0, "euler", 2),
                                                        (1.0, "euler_cfg_pp", 2)])  # fmt: skip
def test_a_hosts_model_counts_both_halves_of_its_cfg(scale, sampler, each):
    """It is one call, and two evaluations where its CFG scale is not 1; also in VE form."""
    flow = kdpp.HostModel(lambda x, sigma, cfg_scale: (0.5 * x, x), flow=True)
    ve = kdpp.HostModel(lambda x, sigma, cfg_scale: (0.5 * x, x), flow=False)
    for model in (ve, search.in_ve(flow)):
        levels, own = [4.0, 1.0, 0.0], {"cond_scale": scale}
        pair = measured.Pair(model, model, sampler, levels, own, 7.5, 8, None)
        assert pair.evaluations == 2 * each
        assert pair.evaluations_of("teacher", 7.5) == 2 and pair.evaluations_of("teacher", 1.0) == 1


def test_batches_and_seeds():
    """How many samples a network sees at once changes nothing; nor does torch's random stream."""
    x = starts(40, 8)
    extra_args = {"cond": torch.rand(40, 1), "shift": {"nested": [torch.rand(40), 3]}}
    seen = []

    def student(x, sigma, cond, shift):
        rows, three = shift["nested"]
        seen.append(len(x))
        assert len(x) == len(cond) == len(rows) and three == 3
        return teacher(x, sigma, cond) + BIAS * rows.view(-1, 1)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole, parts, again, other = (
        tune(student, teacher, x, LEVELS, extra_args, sampler=kdpp.sample_lcm_tg, seed=seed,
             max_batch=rows)
        for seed, rows in ((3, None), (3, 7), (3, None), (4, None))
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert max(seen) == 8 * 20 and 7 in seen  # the student's own looks of a step are one call
    assert whole == again != other
    assert whole.check.change.mean == pytest.approx(parts.check.change.mean, rel=1e-9)
    for a, b in zip(whole.looks, parts.looks, strict=True):
        assert a.scale == pytest.approx(b.scale, rel=1e-6, abs=1e-9)


class Bounded(torch.nn.Module):
    """Trained for these levels; the answer is the path's end, off by BIAS times ``off``."""

    def __init__(self, off, low, high):
        super().__init__()
        self.off, self.sigma_min, self.sigma_max = off, low, high

    def forward(self, x, sigma):
        return (teacher if self.off == 0 else endpoint)(x, sigma) + self.off * BIAS


def test_only_levels_that_both_were_trained_for():
    """No look leaves the networks' range (the wrapper would warn); steps of no length have none."""
    given = starts(20, 4), (5.0, 1.0, 1.0, 0.25, 0.0)
    student, other = Bounded(1, 0.01, 10.0), Bounded(0, 0.28, 10.0)
    tuning = tune(student, other, *given, sampler=kdpp.sample_lcm_tg)
    assert {(look.step, look.renoise) for look in tuning.looks} == {
        (0, 5.0), (0, 1.0), (0, 0.3), (2, 1.0), (2, 0.3)
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"trained for, \[0.28, 0.1\]"):
        tune(Bounded(1, 0.01, 0.1), other, *given, sampler=kdpp.sample_lcm_tg)


class Flow(torch.nn.Module):
    flow = True

    def forward(self, x, sigma):
        return x


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": starts(19, 4)}, "x holds 19 samples"),
        ({"x": torch.zeros(30, 4, dtype=torch.int64)}, "floating point"),
        ({"sigmas": (1.0, 5.0)}, "must not increase"),
        ({"sigmas": (5.0,)}, "two levels or more"),
        ({"teacher_cfg_scale": float("nan")}, "teacher_cfg_scale is nan"),
        ({"teacher_cfg_scale": 2.0}, "CFG"),
        ({"detail": 0}, "detail is 0"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"levels": (-0.1,)}, "must be"),
        ({"student": Flow(), "teacher": Flow()}, "kdpp.as_ve"),
        ({"student": 3}, "must be a denoiser"),
        ({"sampler": partial(kdpp.sample_euler_tg, s_churn=1.0)}, "churn"),
    ],
)
def test_bad_input_is_refused_before_any_call(changed, words):
    calls = []

    def student(x, sigma, **_):
        calls.append(1)
        return x

    given = {"student": student, "teacher": student, "x": starts(30, 4), "sigmas": LEVELS}
    given |= {"sampler": kdpp.sample_lcm_tg} | changed
    with pytest.raises((TypeError, ValueError), match=words):
        tune(**given)
    assert not calls


def test_a_network_that_breaks_is_named():
    def student(x, sigma):
        return torch.full_like(x, math.nan)

    with pytest.raises(ValueError, match="NaN"):
        tune(student, teacher, starts(20, 4), LEVELS, sampler=kdpp.sample_lcm_tg)


# The command, on the shipped pair.


def command(*words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    module.run(parser.parse_args(words))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The command's folder, and its JSON."""
    out = tmp_path_factory.mktemp("tune") / "new"
    command("digits:student", "digits:teacher", "--out", str(out), "--samples", "60")
    return out, json.loads((out / "tuning.json").read_text(encoding="utf-8"))


def test_files(shipped):
    """Both files are there, whole; the JSON holds the looks and says what is printed."""
    out, found = shipped
    assert sorted(path.name for path in out.iterdir()) == ["parts", "tuning.json", "tuning.png"]
    assert (out / "tuning.png").read_bytes().startswith(b"\x89PNG")
    assert found["student"] == "digits:student" and found["samples"] == 60
    assert found["teacher_cfg_scale"] == 2.0 and found["sampler"] == "lcm"
    assert len(found["looks"]) == 3 * 2 * (4 + 4 + 4 + 2)
    assert found["verdict"].startswith("Guide step 3 of 0 to 3")
    assert found["code"] in found["verdict"]
    student, teacher = load_student(), load_teacher()
    sizes = [sum(p.numel() for p in one.parameters()) for one in (student, teacher)]
    compute = 1 + found["cost"]["teacher"] * sizes[1] / (4 * sizes[0])
    assert found["cost"]["compute"] == pytest.approx(compute)


def test_calibrated_scale_transfers_to_fresh_seeds(shipped):
    """On other seeds, written out by hand, the calibrated look brings nearly every picture nearer
    to the teacher's many-step run with the same noise, by what was promised; FD falls with it."""
    _, found = shipped
    student, teacher = (kdpp.kdiffusion.external.CompVisDenoiser(one) for one in
                        (load_student(), load_teacher()))  # fmt: skip
    count = 150
    generator = torch.Generator().manual_seed(77)
    noise = torch.randn(5, count, 1, 8, 8, generator=generator)
    labels = torch.arange(count) % 10
    extra_args = {"cond": labels, "uncond": torch.full_like(labels, 10)}

    def sample(model):
        x, sigmas, draws = noise[0] * SCHEDULE[0], torch.tensor(SCHEDULE), replay(noise[1:4])
        return kdpp.sample_lcm_tg(model, x, sigmas, extra_args, None, True, noise_sampler=draws)

    settings = found["settings"] | {"renoise_noise_sampler": lambda *_: noise[4]}
    guided = sample(kdpp.TeacherGuidedDenoiser(student, teacher, **settings))
    plain = sample(kdpp.TeacherGuidedDenoiser(student, teacher, teacher_steps=0))

    network = load_teacher()
    perfect = noise[0] * SCHEDULE[0]
    with torch.no_grad():
        for i, start in enumerate(SCHEDULE[:-1]):  # the teacher's endpoint by Euler, then noise
            levels = [start, *(s for s in schedule(40) if s < 0.95 * start)]
            for sigma, after in pairwise(levels):
                t = teacher.sigma_to_t(torch.full((count,), sigma))
                estimate = cfg(network.denoise, labels, 10, 2.0)(perfect, t)
                perfect = estimate + (perfect - estimate) * (after / sigma)
            if i < 3:
                perfect = perfect + SCHEDULE[i + 1] * noise[i + 1]
    before, after = (
        (pictures.clamp(-1, 1) - perfect.clamp(-1, 1)).square().flatten(1).mean(1)
        for pictures in (plain, guided)
    )
    assert (after < before).double().mean() > 0.95
    change = float((after - before).mean() / before.mean())
    promised = found["check"]["change"]
    assert promised["low"] - 0.05 < change < promised["high"] + 0.05
    classifier = load_classifier()
    reference = features_of(load_data()[0], classifier)
    distances = [frechet_distance(features_of(x, classifier), reference) for x in (plain, guided)]
    assert distances[1] < distances[0] - 4.0


def test_a_killed_command_leaves_no_answer(tmp_path, monkeypatch):
    """Its files are written at the end only: stopped just before, there are the parts alone."""

    def stopped(tuning):
        raise KeyboardInterrupt

    monkeypatch.setattr(answer, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        command("digits:student", "digits:teacher", "--out", str(tmp_path), "--samples", "20")
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digits:student", "digits:techer"], "did you mean 'digits:teacher'"),
        (["digits:teacher", "digits:teacher"], "--teacher-cfg-scale SCALE"),
        (["digits:student", "digits:teacher", "--sampler", "lcmm"], "did you mean 'lcm'"),
        (["digits:student", "digits:teacher", "--samples", "5"], "--samples is 5"),
        (["digits:student", "digits:teacher", "--steps", "0"], "steps is 0"),
        (["digits:student", "digits:teacher", "--device", "tpu"], "cpu"),
        (["nowhere", "digits:teacher"], "nowhere"),
    ],
)
def test_bad_arguments(words, said, tmp_path):
    """One sentence that says what to mend."""
    with pytest.raises((ValueError, OSError), match=said):
        command(*words, "--out", str(tmp_path / "out"))


def test_a_folder_that_another_run_writes_to(tmp_path):
    with files.locked(tmp_path), pytest.raises(BlockingIOError, match="another run"):
        command("digits:student", "digits:teacher", "--out", str(tmp_path), "--samples", "20")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        command("digits:student", "digits:teacher", "--out", str(tmp_path / "file" / "out"))


def test_missing_matplotlib(tmp_path, monkeypatch):
    """It says what to install, before any work."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'kdpp\[lab\]'"):
        command("digits:student", "digits:teacher", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_page_runs(capsys):
    """The code of docs/tuning.md runs as it stands, and its pair is one to guide."""
    page = Path(__file__).parents[1] / "docs" / "tuning.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    torch.manual_seed(0)
    variables = {}
    exec(compile(code, str(page), "exec"), variables)
    assert variables["tuning"].guide and variables["model"].teachers[0].scale > 0.0
    assert capsys.readouterr().out.startswith("Guide step")
