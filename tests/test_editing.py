"""Image-to-image and inpainting: over every sampler, kdpp's and k-diffusion's."""

import copy
import inspect
import math
import re
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import kdpp
import needs
import problems
from kdpp.editing import Inpainted, image_to_image, inpaint, truncate
from kdpp.kinds import trained_range
from kdpp.models import FlowDenoiser, GuidanceConditioned, as_flow
from problems import (
    SHAPE,
    CFGDenoiser,
    Counted,
    NeverCalled,
    Problem,
    Tape,
    accepts,
    conditions,
    gaussian,
    karras,
    mixture,
    per_sample,
    run,
    seeded,
)

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
STOCK = ["euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2m",
         "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"]  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs" / "editing.md"
SIGMAS = karras(5)
BATCH = 3
IMAGE = seeded(BATCH, *SHAPE, seed=31)
NOISE = seeded(BATCH, *SHAPE, seed=32)
MASK = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
KNOWN = (MASK == 0).expand(BATCH, *SHAPE)


def stock(name):
    """k-diffusion's sampler of this name."""
    return getattr(needs.k_sampling, f"sample_{name}")


def draws(sample):
    return "noise_sampler" in inspect.signature(sample).parameters


def problem():
    return Problem(batch=BATCH, student=Counted(mixture(0)), teacher=Counted(mixture(1)))


def at(sigma):
    """The known region at the levels, one per sample, of one half of CFG or of both."""
    halves = len(sigma) // BATCH
    image, noise = IMAGE.repeat(halves, 1, 1, 1), NOISE.repeat(halves, 1, 1, 1)
    return (image + per_sample(sigma, image) * noise)[..., 0, 0]


# ---------------------------------------------------------------------------------- inpainting


@over_solvers
def test_inpainting_keeps_the_image_in_every_solver(solver):
    """Exactly; student and teacher see it at their own noise level, with one and the same noise.

    (LMS ends on a mix of several estimates, all of them the image: up to rounding.)
    """
    given = problem()
    model = inpaint(given.guided(teacher_steps=3), IMAGE, MASK, NOISE)
    torch.manual_seed(0)
    found = run(solver, model, given.start(SIGMAS), SIGMAS, extra_args=given.extra_args)
    bound = 1e-14 if problems.cancels(solver) else 0.0
    assert (found - IMAGE)[KNOWN].abs().max() <= bound
    assert (found - IMAGE)[~KNOWN].abs().min() > 1e-6
    for network in (given.student, given.teacher):
        assert network.calls
        for call in network.calls:
            assert torch.equal(call.x[..., 0, 0], at(call.sigma))


@needs.k_diffusion
@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inpainting_keeps_the_image_in_stock_samplers(name, dtype):
    """Up to rounding: some of them end on x + (D - x). A user's CFGDenoiser comes marked."""
    network = Counted(mixture(0, dtype))
    cond, uncond = conditions(BATCH, dtype)
    model = inpaint(kdpp.OwnCFG(CFGDenoiser(network)), IMAGE.to(dtype), MASK.to(dtype), NOISE)
    extra = {"cond": cond, "uncond": uncond, "cond_scale": 2.5}
    x = seeded(BATCH, *SHAPE, seed=9, dtype=dtype) * SIGMAS[0].to(dtype)
    options = {"noise_sampler": Tape(x, 1)} if draws(stock(name)) else {}
    found = stock(name)(model, x, SIGMAS.to(dtype), extra, disable=True, **options)
    bound = 1e-5 if dtype == torch.float32 else 1e-14
    assert (found - IMAGE.to(dtype))[KNOWN].abs().max() < bound
    for call in network.calls:
        expected = at(call.sigma.double()).to(dtype)
        torch.testing.assert_close(call.x[..., 0, 0], expected, rtol=1e-6, atol=1e-6)


@needs.k_diffusion
def test_a_wrapper_in_a_stock_sampler():
    given = problem()
    model = inpaint(given.guided(), IMAGE, MASK, NOISE)
    found = stock("dpmpp_2m")(
        model, given.start(SIGMAS), SIGMAS, extra_args=given.extra_args, disable=True
    )
    assert torch.equal(found[KNOWN], IMAGE[KNOWN])
    assert given.student.calls and not given.teacher.calls


def test_the_estimate_is_the_formula():
    """With a mask that blends, and the conditions handed on."""
    cond, _ = conditions(BATCH)
    mask = torch.rand(BATCH, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    x, sigma = seeded(BATCH, *SHAPE, seed=3), torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    network = Counted(mixture())
    found = inpaint(network, IMAGE, mask, NOISE)(x, sigma, cond=cond)
    seen = (1 - mask) * (IMAGE + per_sample(sigma, x) * NOISE) + mask * x
    expected = (1 - mask) * IMAGE + mask * mixture()(seen, sigma, cond=cond)
    torch.testing.assert_close(network.calls[0].x, seen)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_masks_of_one_value(value):
    """All known: the image. Nothing known: the plain model."""
    given, mask = problem(), torch.full((1,), value)
    models = (inpaint(given.guided(), IMAGE, mask, NOISE), given.guided())
    found, plain = (
        kdpp.sample_dpmpp_2m_tg(m, given.start(SIGMAS), SIGMAS, given.extra_args, disable=True)
        for m in models
    )
    assert torch.equal(found, plain if value else IMAGE)


@pytest.mark.parametrize("shape", [(), (2, 2), (1, 2, 2), SHAPE, (1, 1, 2, 2), (BATCH, *SHAPE)])
def test_masks_that_broadcast(shape):
    """Also a bool one; and one image for the whole batch."""
    mask = torch.zeros(shape, dtype=torch.bool)
    x, sigma = seeded(BATCH, *SHAPE, seed=3), torch.ones(BATCH, dtype=torch.float64)
    assert torch.equal(inpaint(mixture(), IMAGE, mask, NOISE)(x, sigma), IMAGE)
    if shape[:1] != (BATCH,) or len(shape) < 4:
        one = inpaint(mixture(), IMAGE[:1], mask, NOISE[:1])(x, sigma)
        assert torch.equal(one, IMAGE[:1].expand_as(x))


def test_the_wrapper_given_stays_as_it_is():
    """The new one has its settings, and networks of its own around the same ones."""
    given = problem()
    model = given.guided(teacher_scale=0.3, teacher_steps=2, renoise=0.7)
    before = {**vars(model), "_modules": dict(model._modules)}
    twin = inpaint(model, IMAGE, MASK, NOISE)
    assert {**vars(model), "_modules": dict(model._modules)} == before
    assert model.student is given.student and model.teachers[0].denoiser is given.teacher
    assert twin.student.inner_model is given.student
    assert twin.teachers[0].denoiser.inner_model is given.teacher
    bare = [replace(m.teachers[0], denoiser=given.teacher) for m in (model, twin)]
    assert bare[0] == bare[1] and len(twin.teachers) == 1
    copy.deepcopy(twin)


def test_several_teachers_see_the_same_region():
    """Each with settings of its own; one in another latent space has no such mask."""
    teachers = [Counted(mixture(seed)) for seed in (1, 2)]
    several = [kdpp.Teacher(t, scale=0.3, cfg_scale=1.0, renoise="current") for t in teachers]
    twin = inpaint(kdpp.TeacherGuidedDenoiser(mixture(), several), IMAGE, MASK, NOISE)
    found = kdpp.sample_euler_tg(twin, 10 * NOISE, SIGMAS, disable=True)
    assert torch.equal(found[KNOWN], IMAGE[KNOWN])
    for teacher in teachers:
        (call,) = teacher.calls
        assert torch.equal(call.x[..., 0, 0], at(call.sigma))
    mapped = kdpp.Teacher(mixture(), maps=(lambda x: x, lambda x: x))
    with pytest.raises(ValueError, match="maps"):
        inpaint(kdpp.TeacherGuidedDenoiser(mixture(), mapped), IMAGE, MASK, NOISE)


def test_plain_functions_as_networks():
    """Not only modules."""
    model = kdpp.TeacherGuidedDenoiser(lambda x, s: x * 0, lambda x, s: x * 0, teacher_cfg_scale=1)
    twin = inpaint(model, IMAGE, MASK, NOISE)
    found = kdpp.sample_euler_tg(twin, NOISE, SIGMAS, disable=True)
    assert torch.equal(found, torch.where(KNOWN, IMAGE, 0.0))
    assert not isinstance(model.student, Inpainted)


@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-2]], ids=["to zero", "unfinished"])
def test_marked_models_stay_marked(sigmas):
    """A CFG++ run: the unconditional estimate keeps the image too, and is the same run."""
    networks = [CFGDenoiser(mixture(seed)) for seed in (0, 1)]
    marked = [
        kdpp.OwnCFG(network, lambda network=network: network.uncond_denoised)
        for network in networks
    ]
    own = kdpp.TeacherGuidedDenoiser(*marked, teacher_cfg_scale=4.0)
    plain = kdpp.TeacherGuidedDenoiser(mixture(0), mixture(1), teacher_cfg_scale=4.0)
    found, expected = [], []
    for results, model in ((found, own), (expected, plain)):
        twin = inpaint(model, IMAGE, MASK, NOISE)
        assert isinstance(twin.student, kdpp.OwnCFG) == isinstance(model.student, kdpp.OwnCFG)
        twin.renoise_noise_sampler = Tape(IMAGE, 3)
        given = problem()
        results.append(
            kdpp.sample_dpmpp_2m_cfg_pp_tg(
                twin, given.start(sigmas), sigmas, given.extra_args, disable=True
            )
        )
    assert torch.equal(found[0][KNOWN], IMAGE[KNOWN]) == (sigmas[-1] == 0)
    torch.testing.assert_close(*found, *expected)
    assert marked[0].model is networks[0]


@needs.k_diffusion
def test_a_kind_of_its_own_stays_what_it_is():
    """A subclass of OwnCFG, which does things around its network: marked, and called as it is."""
    network = Counted(lambda x, sigma, w, cond: mixture()(x, sigma, cond=cond) + per_sample(w, x))
    model = inpaint(GuidanceConditioned(network), IMAGE, MASK, NOISE)
    assert isinstance(model, kdpp.OwnCFG) and model.uncond_denoised is None
    cond, uncond = conditions(BATCH)
    extra = {"cond": cond, "uncond": uncond, "cond_scale": 3.0}
    found = stock("dpmpp_2m")(model, NOISE * SIGMAS[0], SIGMAS, extra_args=extra, disable=True)
    assert torch.equal(found[KNOWN], IMAGE[KNOWN])
    assert all(call.extra["w"].tolist() == [2.0] * BATCH for call in network.calls)


@pytest.mark.parametrize("images", [1, BATCH])
@pytest.mark.parametrize("max_batch", [1, 2, 4, 5])
def test_a_cap_on_the_rows_of_a_call(max_batch, images):
    """Every row of a split call is inpainted with its own image: as without the cap."""
    mask = torch.rand(images, *SHAPE, generator=torch.Generator().manual_seed(1))

    def sampled(cap):
        given = problem()
        draws = kdpp.Teacher(given.teacher, scale=0.4, steps=2, cfg_scale=3.0, draws=2)
        noise = {"renoise_noise_sampler": Tape(IMAGE, 3)}
        model = kdpp.TeacherGuidedDenoiser(given.student, draws, max_batch=cap, **noise)
        twin = inpaint(model, IMAGE[:images], mask, NOISE[:images])
        found = kdpp.sample_dpmpp_2s_ancestral_tg(
            twin, given.start(SIGMAS), SIGMAS, given.extra_args, disable=True,
            noise_sampler=Tape(IMAGE, 4),
        )  # fmt: skip
        return found, {len(call.x) for call in given.student.calls + given.teacher.calls}

    found, rows = sampled(max_batch)
    assert max(rows) <= max_batch
    torch.testing.assert_close(found, sampled(None)[0], rtol=0, atol=1e-12)


def test_a_cap_on_a_kind_of_its_own():
    """One whose batch may be split is split with its images, under its mark; another is not."""

    def student(x, sigma, w, cond):
        rows.append(len(x))
        return mixture()(x, sigma, cond=cond) + per_sample(w, x)

    given = problem()
    options = {"teacher_steps": 0, "renoise_noise_sampler": Tape(IMAGE, 3)}
    found = []
    for cap, split in ((2, True), (None, True), (2, False)):
        rows, network = [], GuidanceConditioned(student)
        network.divisible = split
        pair = kdpp.TeacherGuidedDenoiser(network, NeverCalled(), max_batch=cap, **options)
        twin = inpaint(pair, IMAGE, MASK, NOISE)
        x = given.start(SIGMAS)
        found.append(kdpp.sample_euler_tg(twin, x, SIGMAS, given.extra_args, disable=True))
        assert max(rows) == (2 if cap and split else BATCH)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    assert torch.equal(found[1], found[2])


def test_a_cap_on_a_model_inpainted_twice():
    """One region of each image, then another: both wrappers learn which rows they are given."""
    given = problem()
    other, noise = seeded(BATCH, *SHAPE, seed=33), seeded(BATCH, *SHAPE, seed=34)
    found, expected = (
        kdpp.sample_euler_tg(
            inpaint(inpaint(given.guided(teacher_steps=0, max_batch=cap), other, MASK.T, noise),
                    IMAGE, 1 - MASK.flip(0, 1), NOISE),
            given.start(SIGMAS), SIGMAS, given.extra_args, disable=True,
        )
        for cap in (2, None)
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_model_that_says_its_schedule_still_says_it():
    """Itself or through wrappers of its own."""

    class Scheduled(torch.nn.Module):
        sigma_min, sigma_max = 0.1, 7.0

    holder = torch.nn.Module()
    holder.inner_model = Scheduled()
    for model in (Scheduled(), holder):
        assert trained_range(Inpainted(model, IMAGE, MASK, NOISE)) == (0.1, 7.0)


def test_the_estimate_reads_nothing_back():
    """On the meta device every read of a number would raise."""
    model = inpaint(mixture(), IMAGE, MASK, NOISE).to("meta")
    found = model(torch.empty_like(IMAGE, device="meta"), torch.empty(BATCH, device="meta"))
    assert found.shape == IMAGE.shape and found.device.type == "meta"


def test_dtypes_and_devices_follow_the_latent():
    """A float32 image in a float64 run; the buffers are no part of the weights."""
    given = problem()
    model = inpaint(given.guided(), IMAGE.float(), MASK.float(), NOISE.float())
    found = kdpp.sample_euler_tg(model, given.start(SIGMAS), SIGMAS, given.extra_args, disable=True)
    assert found.dtype == torch.float64
    assert torch.equal(found[KNOWN], IMAGE.float().double()[KNOWN])
    assert not inpaint(mixture(), IMAGE, MASK, NOISE).state_dict().keys() & {"image", "noise"}


@needs.k_diffusion
@pytest.mark.parametrize(("name", "mean"), [("euler", 0.9), ("euler_ancestral", 1.2)])
def test_how_much_the_known_region_tells_the_rest(name, mean):
    """Two pixels with correlation 0.9, the first known to be 2: exactly, the other's mean is 1.8.

    Putting the known region in its place is an approximation, which falls short of that; the docs
    say by how much.
    """
    eye = torch.eye(2, dtype=torch.float64)
    covariance = 0.9 + 0.1 * eye

    def denoiser(x, sigma):
        return x @ (covariance @ torch.linalg.inv(covariance + sigma[0] ** 2 * eye)).T

    image = torch.full((4000, 2), 2.0, dtype=torch.float64)
    model = inpaint(denoiser, image, torch.tensor([0.0, 1.0]), seeded(4000, 2, seed=1))
    torch.manual_seed(0)
    found = stock(name)(model, seeded(4000, 2, seed=2) * SIGMAS[0], karras(60), disable=True)
    torch.testing.assert_close(found[:, 0], image[:, 0])
    assert float(found[:, 1].mean()) == pytest.approx(mean, abs=0.05)


BAD_INPAINT = {
    "image an integer": ({"image": IMAGE.long()}, TypeError, "image has dtype torch.int64"),
    "image no tensor": ({"image": IMAGE.tolist()}, TypeError, "image is a list"),
    "image without dimensions": ({"image": torch.tensor(1.0)}, ValueError, "image has shape ()"),
    "mask of another shape": ({"mask": torch.ones(3, 3)}, ValueError, "mask has shape (3, 3)"),
    "mask with a batch too many": ({"mask": torch.ones(2, *SHAPE)}, ValueError, "mask has shape"),
    "mask of more dimensions": ({"mask": torch.ones(1, BATCH, *SHAPE)}, ValueError, "mask has"),
    "mask above 1": ({"mask": MASK * 255}, ValueError, "from 0.0 to 255.0"),
    "mask below 0": ({"mask": MASK - 0.5}, ValueError, "from -0.5 to 0.5"),
    "mask nan": ({"mask": MASK * math.nan}, ValueError, "nan"),
    "mask no tensor": ({"mask": 1.0}, TypeError, "mask is float"),
    "noise of another shape": ({"noise": NOISE[:1]}, ValueError, "noise has shape (1, 3, 2, 2)"),
    "noise an integer": ({"noise": NOISE.long()}, TypeError, "noise is torch.int64"),
    "noise no tensor": ({"noise": 0}, TypeError, "noise is int"),
    "model": ({"model": None}, TypeError, "model is None"),
    "model unmarked": ({"model": CFGDenoiser(mixture())}, TypeError, "model=kdpp.OwnCFG"),
}


@pytest.mark.parametrize(("changed", "error", "given"), BAD_INPAINT.values(), ids=BAD_INPAINT)
def test_inpaint_refuses(changed, error, given):
    options = {"model": NeverCalled(), "image": IMAGE, "mask": MASK, "noise": NOISE, **changed}
    with pytest.raises(error) as raised:
        inpaint(**options)
    assert given in str(raised.value)


@pytest.mark.parametrize("shape", [(2, *SHAPE), (BATCH + 1, *SHAPE), (BATCH, 1, 2, 2), (BATCH, 12)])
def test_a_latent_that_the_image_does_not_fit(shape):
    pair = kdpp.TeacherGuidedDenoiser(NeverCalled(), NeverCalled(), teacher_cfg_scale=1.0)
    model = inpaint(pair, IMAGE, MASK, NOISE)
    with pytest.raises(ValueError, match="the image to inpaint has shape"):
        kdpp.sample_euler_tg(model, torch.ones(shape), SIGMAS, disable=True)


def test_an_output_that_would_broadcast():
    model = inpaint(lambda x, sigma: x[:, :1], IMAGE, MASK, NOISE)
    with pytest.raises(ValueError, match=r"returned shape \(3, 1, 2, 2\)"):
        model(NOISE, torch.ones(BATCH, dtype=torch.float64))


# ---------------------------------------------------------------------------------- image to image


@over_solvers
def test_image_to_image_is_the_sampler_from_the_noised_image(solver):
    given, sigmas = problem(), SIGMAS[2:]

    def sample(*args, **options):
        own = {"noise_sampler": Tape(IMAGE, 1)} if accepts(solver, "noise_sampler") else {}
        return solver.sample(*args, disable=True, **own, **options)

    def model():
        return given.guided(renoise_noise_sampler=Tape(IMAGE, 2))

    found = image_to_image(sample, model(), IMAGE, sigmas, given.extra_args, noise=NOISE)
    start = IMAGE + sigmas[0] * NOISE
    torch.testing.assert_close(found, sample(model(), start, sigmas, given.extra_args))


@needs.k_diffusion
@pytest.mark.parametrize("name", STOCK)
def test_image_to_image_with_stock_samplers(name):
    """The default noise is drawn as k-diffusion draws it; one exact step returns the image."""
    torch.manual_seed(4)
    noise = torch.randn_like(IMAGE)
    torch.manual_seed(4)
    seen = Counted(lambda x, sigma: IMAGE.clone())
    before = IMAGE.clone()
    found = image_to_image(stock(name), seen, IMAGE, SIGMAS[3:], disable=True)
    torch.testing.assert_close(seen.calls[0].x, IMAGE + SIGMAS[3] * noise)
    torch.testing.assert_close(found, IMAGE)
    assert torch.equal(IMAGE, before)


@needs.k_diffusion
def test_little_noise_keeps_the_image_much_noise_forgets_it():
    """The exact Gaussian: the correlation with the image falls with the strength."""
    model, count = gaussian(), 500
    image = model.mean + model.variance.sqrt() * seeded(count, *SHAPE, seed=5)
    kept = []
    for strength in (0.1, 0.4, 0.7, 1.0):
        sigmas = truncate(karras(40), strength)
        found = image_to_image(stock("dpmpp_2m"), model, image, sigmas, disable=True,
                               noise=seeded(count, *SHAPE, seed=6))  # fmt: skip
        pair = torch.stack([(t - t.mean(0)).flatten() for t in (found, image)])
        kept.append(float(torch.corrcoef(pair)[0, 1]))
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 0.95 and kept[-1] < 0.3


@pytest.mark.parametrize(
    "sample", ["kdpp", "partial", *map(needs.case, ["dpm_fast", "dpm_adaptive"])]
)
def test_image_to_image_with_samplers_that_make_their_own_levels(sample):
    """DPM-Solver fast and adaptive get the first level and the last above 0, in place of sigmas."""
    levels = SIGMAS[1:]
    low, high = float(levels[-2]), float(levels[0])
    start = IMAGE + high * NOISE
    model = kdpp.TeacherGuidedDenoiser(mixture(0), mixture(1), teacher_cfg_scale=1.0)
    ours = {"kdpp": kdpp.sample_dpm_fast_tg, "partial": partial(kdpp.sample_dpm_fast_tg)}
    run = ours[sample] if sample in ours else stock(sample)
    count = () if sample == "dpm_adaptive" else (6,)
    torch.manual_seed(1)
    expected = run(model, start, low, high, *count, disable=True)
    torch.manual_seed(1)
    found = image_to_image(run, model, IMAGE, levels, *count, noise=NOISE, disable=True)
    assert torch.equal(found, expected)


def test_one_noise_for_image_to_image_and_inpainting():
    """The known region of the start is then what the models see."""
    given, sigmas = problem(), truncate(SIGMAS, 0.6)
    model = inpaint(given.guided(), IMAGE, MASK, NOISE)
    said = []
    found = image_to_image(
        kdpp.sample_euler_tg, model, IMAGE, sigmas, given.extra_args, said.append, noise=NOISE,
        disable=True,
    )  # fmt: skip
    for info in said:  # Euler keeps the known region on its way
        expected = IMAGE + info["sigma"] * NOISE
        torch.testing.assert_close(info["x"][KNOWN], expected[KNOWN])
    assert torch.equal(found[KNOWN], IMAGE[KNOWN])


def test_flow_models():
    """VE and flow form of one model: the same image, inpainted from a noised one."""
    network = mixture()
    sigmas = truncate(SIGMAS, 0.8)
    taus = sigmas / (1 + sigmas)

    def euler(model, x, levels):
        for level, after in pairwise(levels):
            denoised = model(x, level.expand(BATCH))
            x = denoised + (x - denoised) * (after / level)
        return x

    found = [
        image_to_image(euler, inpaint(model, IMAGE, MASK, NOISE), IMAGE, levels, noise=NOISE)
        for model, levels in ((network, sigmas), (as_flow(network), taus))
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    pure = image_to_image(
        lambda model, x, sigmas: x, FlowDenoiser(NeverCalled()), IMAGE, torch.tensor([1.0, 0.0]),
        noise=NOISE,
    )  # fmt: skip
    assert torch.equal(pure, NOISE)


@pytest.mark.parametrize("said", ["by the model", "by the wrapper"])
def test_a_flow_pair_under_guidance(said):
    """Student and teacher see (1-t) x0 + t n; the wrapper may be the one who knows."""
    networks = [Counted(as_flow(mixture(seed))) for seed in (0, 1)]
    options = {"flow": True} if said == "by the wrapper" else {}
    if not options:
        networks[0].flow = networks[1].flow = True
    pair = kdpp.TeacherGuidedDenoiser(*networks, teacher_cfg_scale=1.0, **options)
    taus = torch.tensor([1.0, 0.8, 0.4, 0.0], dtype=torch.float64)
    model = inpaint(pair, IMAGE, MASK, NOISE)
    found = image_to_image(kdpp.sample_euler_tg, model, IMAGE, taus, noise=NOISE, disable=True)
    assert torch.equal(found[KNOWN], IMAGE[KNOWN])
    for network in networks:
        assert network.calls
        for call in network.calls:
            tau = call.sigma[0]
            expected = (1 - tau) * IMAGE + tau * NOISE
            torch.testing.assert_close(call.x[..., 0, 0], expected[..., 0, 0])


def test_levels_of_sigma_for_a_flow_model():
    with pytest.raises(ValueError, match="flow model, whose levels lie in"):
        image_to_image(NeverCalled(), FlowDenoiser(NeverCalled()), IMAGE, SIGMAS)


@pytest.mark.parametrize(
    ("strength", "kept"), [(1.0, 10), (1, 10), (0.7, 7), (0.3, 3), (0.29, 3), (0.04, 1), (1e-9, 1)]
)
def test_truncate(strength, kept):
    sigmas = karras(10)
    cut = truncate(sigmas, strength)
    assert torch.equal(cut, sigmas[-(kept + 1) :])


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, math.nan, True, "half", None])
def test_truncate_refuses_a_strength(strength):
    with pytest.raises(ValueError, match="strength is"):
        truncate(SIGMAS, strength)


@pytest.mark.parametrize("function", [
    lambda sigmas: truncate(sigmas, 0.5),
    lambda sigmas: image_to_image(NeverCalled(), NeverCalled(), IMAGE, sigmas),
])  # fmt: skip
@pytest.mark.parametrize("sigmas", [SIGMAS.flip(0), SIGMAS[None], SIGMAS * math.nan, -SIGMAS])
def test_bad_sigmas(function, sigmas):
    with pytest.raises(ValueError, match="sigmas"):
        function(sigmas)


def test_image_to_image_refuses():
    def refused(error, match, image=IMAGE, sigmas=SIGMAS, **options):
        with pytest.raises(error, match=match):
            image_to_image(NeverCalled(), NeverCalled(), image, sigmas, **options)

    refused(TypeError, "image has dtype", image=IMAGE.int())
    refused(TypeError, "image is a NoneType", image=None)
    refused(ValueError, "noise has shape", noise=NOISE[:, :1])
    refused(TypeError, "noise is str", noise="random")
    refused(ValueError, "sigmas is empty", sigmas=torch.tensor([]))
    refused(ValueError, "its batch is empty", image=IMAGE[:0])
    refused(TypeError, "sigmas is None", sigmas=None)
    with pytest.raises(TypeError, match="sample is 'euler'; it must be a sampler"):
        image_to_image("euler", NeverCalled(), IMAGE, SIGMAS)


# ---------------------------------------------------------------------------------- the docs


def test_the_examples_of_the_page_run():
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 2
    variables = {}
    for example in examples:
        exec(example, variables)
    images, found = variables["images"], variables["inpainted"]
    assert torch.equal(found[:, :, :4], images[:, :, :4])
    read = variables["classifier"](found.clamp(-1, 1)).argmax(1)
    assert (read == variables["labels"]).double().mean() > 0.9
