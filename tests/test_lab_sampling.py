"""Images from seeds: in which order and after which accident makes no difference."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import harness_cost
import kdpp
import problems
from kdpp.lab import processes, sampling
from kdpp.lab.models import DataOrigin, Model, ModelCard, load_model
from kdpp.lab.networks import VEDenoiser, build
from kdpp.lab.sampling import Batches, Recipe, draw, fingerprint, image_seeds
from kdpp.noise import SeededNoise

GUIDANCE = {"teacher_scale": 0.5, "teacher_cfg_scale": 2.0, "renoise_eta": 0.7}
STUDENT, TEACHER = load_model("digits:student"), load_model("digits:teacher")
LEVELS = STUDENT.levels_for(4)


def recipe(sampler="lcm", **changes):
    """The student guided by its teacher."""
    return replace(Recipe(STUDENT, TEACHER, sampler, LEVELS, guidance=GUIDANCE), **changes)


def alone(sampler="euler", **changes):
    return recipe(sampler, teacher=None, guidance={}, **changes)


def tiny(*conditions, ranges=(0.0, 3.0)):
    """A small random model of three classes that takes the conditions."""
    config = {
        "kind": "resmlp", "width": 8, "hidden": 8, "blocks": 1,
        "shape": [1, 4, 4], "classes": 3, "conditions": list(conditions),
    }  # fmt: skip
    torch.manual_seed(0)
    network = build(config)
    for parameter in network.parameters():  # a new network's last layers are 0
        torch.nn.init.normal_(parameter, std=0.3)
    network.eval().requires_grad_(False)
    card = ModelCard(
        method="test",
        network=config,
        sampler="euler",
        data=DataOrigin(source="test", shape=(1, 4, 4), classes=3, bounded=True),
        conditions={name: ranges for name in conditions},
    )
    return Model(VEDenoiser(network), network, card)


def same_bits(a, b):
    return a.numpy().tobytes() == b.numpy().tobytes()


# One process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", problems.on_schedules(kdpp.SOLVERS), ids=lambda one: one.name)
def test_an_image_depends_on_its_seed_alone(solver):
    """Another place, other company, another global seed: the same image, by every sampler."""
    seeds, sampler = [5, 3, 2**40 + 7, 11], solver.name
    scale = 0.8 if solver.cfg_pp else 1.5
    made = draw(recipe(sampler, cond_scale=scale), seeds).x
    torch.manual_seed(99)
    others = [11, 8, 5, 2**40 + 7, 3, 0]
    found = draw(recipe(sampler, cond_scale=scale), others).x
    torch.testing.assert_close(found[[2, 4, 3, 0]], made, rtol=1e-4, atol=1e-5)
    assert (made[0] - made[1]).abs().max() > 0.1
    assert (found[1] - found[2]).abs().max() > 0.1


def test_images_are_those_of_a_plain_call():
    """The three streams, the labels, the CFG and the guidance, written out."""
    seeds = torch.tensor([4, 17, 23])
    like = torch.empty(3, 1, 8, 8)
    model = kdpp.TeacherGuidedDenoiser(
        STUDENT.denoiser, TEACHER.denoiser, renoise_noise_sampler=SeededNoise(like, seeds, 2),
        **GUIDANCE,
    )  # fmt: skip
    extra_args = {
        "cond": torch.tensor([4, 7, 3]),
        "uncond": torch.full((3,), 10),
        "cond_scale": 1.3,
    }
    expected = kdpp.sample_euler_ancestral_tg(
        model, LEVELS[0] * SeededNoise(like, seeds, 0)(), torch.tensor(LEVELS), extra_args,
        disable=True, eta=0.6, noise_sampler=SeededNoise(like, seeds, 1),
    )  # fmt: skip
    found = draw(recipe("euler_ancestral", cond_scale=1.3, options={"eta": 0.6}), seeds.tolist())
    assert same_bits(found.x, expected)
    assert found.labels.tolist() == [4, 7, 3]


def test_guidance_changes_the_images_and_no_other_noise():
    """λ → 0 gives the student's own images; λ = 0.5 others."""
    seeds = image_seeds(0, 6)
    base = draw(alone("lcm"), seeds).x
    faint = draw(recipe(guidance={**GUIDANCE, "teacher_scale": 1e-12}), seeds).x
    torch.testing.assert_close(faint, base)
    assert (draw(recipe(), seeds).x - base).abs().max() > 0.1


def test_labels_are_those_that_are_given():
    labels = torch.tensor([7, 10, 0])
    made = draw(alone(), [1, 2, 3], labels)
    assert torch.equal(made.labels, labels)
    own = draw(alone(), [1, 2, 3]).x
    assert (made.x - own).abs().flatten(1).amax(1).min() > 0.1


def test_batches_of_any_size_give_the_same_images():
    seeds = image_seeds(2, 10)
    whole, parts = (draw(recipe(), seeds, chunk=chunk).x for chunk in (10, 4))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_random_levels_are_drawn_for_each_batch():
    """From the seed of its first image: repeatable, whatever torch's own seed is."""
    wild = recipe(guidance={**GUIDANCE, "renoise": "random"})
    torch.manual_seed(0)
    made = draw(wild, range(8), chunk=4).x
    torch.manual_seed(1)
    assert same_bits(made, draw(wild, range(8), chunk=4).x)
    assert same_bits(made[4:], draw(wild, range(4, 8), chunk=4).x)
    assert (made[4:] - draw(wild, range(8), chunk=8).x[4:]).abs().max() > 1e-3


def test_torchs_streams_and_threads_are_left_alone():
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    used = []
    handle = STUDENT.network.register_forward_hook(lambda *_: used.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        draw(recipe("dpmpp_sde"), [1, 2])
        assert set(used) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert not STUDENT.network._forward_pre_hooks


@pytest.mark.parametrize(
    ("how", "evaluations"),
    [
        (alone(), (4, 0)),
        (alone(cond_scale=2.0), (8, 0)),
        (alone("heun"), (7, 0)),
        (recipe(), (4, 2)),
        (recipe(guidance={"teacher_steps": 3, "teacher_cfg_scale": 1.0}), (4, 3)),
        (recipe(teacher=STUDENT, guidance={"teacher_cfg_scale": 1.0}), (5, 0)),
    ],
)
def test_evaluations_are_counted(how, evaluations):
    """Of both networks for one image; the student in the teacher's place is the student."""
    made = draw(how, range(10), chunk=4)
    assert made.evaluations == evaluations
    teacher = how.teacher or STUDENT
    assert made.compute == (
        evaluations[0] * STUDENT.parameters + evaluations[1] * teacher.parameters
    )
    assert made.seconds > 0 and made.memory >= 0


@pytest.mark.parametrize(
    ("conditions", "given"),
    [((), {}), (("w",), {"w": 0.5}), (("steps",), {"steps": 3.0}), (("w", "steps"), None)],
)
def test_networks_get_the_conditions_that_they_take(conditions, given):
    """w is the CFG scale less 1, in one call without a second half; steps is their number."""
    model = tiny(*conditions)
    seen = []
    model.network.register_forward_pre_hook(
        lambda network, inputs, keywords: seen.append((len(inputs[0]), keywords)), with_kwargs=True
    )
    scale = 1.5 if "w" in conditions else 1.0
    how = Recipe(model, model, "euler", (10.0, 3.0, 1.0, 0.0), scale, {"teacher_cfg_scale": scale})
    made = draw(how, [0, 1])
    assert made.evaluations == (4, 0) and len(seen) == 4  # the last is its own teacher's
    expected = {"w": 0.5, "steps": 3.0} if given is None else given
    for count, keywords in seen:
        assert count == 2 and keywords.keys() == expected.keys()
        assert all(keywords[name].tolist() == [value] * 2 for name, value in expected.items())


def test_levels_for_a_model():
    """Its own where they make so many steps, else the schedule's."""
    bound = tiny()
    bound = replace(bound, card=replace(bound.card, levels=(9.0, 2.0, 0.0)))
    assert bound.levels_for() == bound.levels_for(2) == (9.0, 2.0, 0.0)
    assert bound.levels_for(3) == kdpp.digits.schedule(3)
    assert (len(STUDENT.levels_for()), len(TEACHER.levels_for())) == (5, 51)


def test_no_two_seeds_share_an_image():
    assert set(image_seeds(0, 10**6)).isdisjoint(image_seeds(1, 10**6))
    assert list(image_seeds(3, 2)) == [3_000_000, 3_000_001]


class Operations(TorchDispatchMode):
    """Counts the operations of torch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", harness_cost.recipes())
def test_the_harness_costs_next_to_nothing(name):
    """The same images as plain calls give, and at most 2 % more operations of torch."""
    how = harness_cost.recipes()[name]
    counts, images = [], []
    for run in (
        lambda: draw(how, image_seeds(0, 40), chunk=20).x,
        lambda: harness_cost.bare(how, 40, 20, seeded=True),
    ):
        with processes.single_thread(), Operations() as operations:
            images.append(run())
        counts.append(operations.count)
    assert same_bits(*images)
    assert counts[1] <= counts[0] <= 1.02 * counts[1] + 10


# What cannot be done ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: recipe("eulr"), "unknown solver 'eulr'; did you mean 'euler'"),
        (lambda: recipe("dpm_fast"), "dpm_fast makes its own levels"),
        (lambda: recipe(levels=(1.0, 2.0)), "levels must not increase"),
        (lambda: recipe(levels=(1.0,)), "give two or more"),
        (lambda: recipe(options={"eat": 1}), "unknown option of lcm 'eat'"),
        (lambda: recipe(options={"noise_sampler": 1}), "unknown option of lcm"),
        (lambda: recipe("euler", options={"s_churn": 0.1}), "s_churn adds noise"),
        (lambda: recipe(guidance={"teacher_scal": 1}), "did you mean 'teacher_scale'"),
        (lambda: recipe(guidance={"teacher_scale": 2.0}), "teacher_scale is 2.0"),
        (lambda: recipe(teacher=None), "needs a teacher"),
        (lambda: recipe(cond_scale="1"), "cond_scale is '1'"),
        (lambda: recipe(teacher=tiny()), r"\[1, 4, 4\] and 3"),
        (
            lambda: recipe(student=tiny("w"), teacher=None, guidance={}, cond_scale=5.0),
            "CFG scales in",
        ),
        (lambda: recipe(student=tiny("v"), teacher=None, guidance={}), "know w and steps only"),
        (lambda: draw(recipe(), []), "seeds is empty"),
        (lambda: draw(recipe(), [-1]), "-1"),
        (lambda: draw(recipe(), [1, 2], torch.tensor([1])), "one for each of the 2 seeds"),
        (lambda: draw(recipe(), [1], torch.tensor([1.0])), "int64"),
        (lambda: draw(recipe(), [1], torch.tensor([11])), "0 … 10"),
        (lambda: draw(recipe(), [1], chunk=0), "chunk is 0"),
        (lambda: image_seeds(0, 10**6 + 1), "10"),
        (lambda: image_seeds(-1, 5), "seed is -1"),
        (lambda: image_seeds(10**12, 5), "below 1,000,000,000,000"),
    ],
)
def test_bad_input(make, said):
    """One sentence, before any network is called."""
    called = []
    handle = STUDENT.network.register_forward_pre_hook(lambda *_: called.append(1))
    try:
        with pytest.raises(ValueError, match=said):
            make()
    finally:
        handle.remove()
    assert not called


def test_a_solver_of_ones_own_is_found_when_it_is_used(monkeypatch):
    """Entered after the lab was imported, it samples by its name; a function's name does, too."""
    mine = replace(kdpp.SOLVERS["euler"], name="mine", sample=None)
    monkeypatch.setitem(kdpp.SOLVERS, "mine", mine)
    expected = draw(alone("euler"), [1, 2]).x
    assert same_bits(draw(alone("mine"), [1, 2]).x, expected)
    assert same_bits(draw(alone("sample_euler_tg"), [1, 2]).x, expected)


# Work that is kept --------------------------------------------------------------------------------


class Died(Exception):
    """Stands for the end of a process."""


@pytest.fixture
def written_at_once(monkeypatch):
    monkeypatch.setattr(sampling, "PATIENCE", 0.0)


def die_after(monkeypatch, batches):
    """Have the process end before it samples another batch."""
    sample, left = sampling._sample, iter(range(batches))

    def mortal(*arguments):
        if next(left, None) is None:
            raise Died
        return sample(*arguments)

    monkeypatch.setattr(sampling, "_sample", mortal)


def made(folder, wanted=range(5)):
    """Ten images in five batches, those that are wanted."""
    batches = Batches(recipe(), range(10), chunk=2, folder=folder)
    batches.make(wanted)
    return batches


@pytest.mark.usefixtures("written_at_once")
def test_finished_batches_are_not_computed_again(tmp_path):
    """Two batches were done: the next run makes the other three, and the same images."""
    expected = draw(recipe(), range(10), chunk=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        die_after(patch, 2)
        made(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 3)
        found = made(tmp_path).images()
    assert same_bits(found.x, expected.x) and found.evaluations == expected.evaluations
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 0)
        again = made(tmp_path).images()
    assert same_bits(again.x, expected.x) and again.seconds == found.seconds


def test_batches_are_shared_through_the_folder(tmp_path):
    """What others have made is taken, once they have written it; costs add up."""
    expected = draw(recipe(), range(10), chunk=2)
    one, other = made(tmp_path, [0, 2, 4]), made(tmp_path, [1, 3])
    assert not one.complete()
    other.flush()
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 0)
        assert one.complete() and not other.complete()
    found = one.images()
    assert same_bits(found.x, expected.x)
    assert (found.evaluations, found.compute) == (expected.evaluations, expected.compute)
    assert found.seconds > sum(batch.seconds for batch in other.done.values())


@pytest.mark.usefixtures("written_at_once")
def test_damaged_and_foreign_files_are_passed_over(tmp_path):
    expected = made(tmp_path).images().x
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:100])
    save_file({"1": torch.zeros(2, 1, 8, 8)}, second)
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert same_bits(made(tmp_path).images().x, expected)


def test_little_work_is_held_back(tmp_path, monkeypatch):
    """Batches are written once they are worth the wait, several in one file."""
    monkeypatch.setattr(sampling, "PATIENCE", 2.5)
    clock = itertools.count()
    monkeypatch.setattr(sampling.time, "perf_counter", lambda: next(clock))  # a second each
    batches = Batches(recipe(), range(14), chunk=2, folder=tmp_path)
    batches.make(range(7))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000000.safetensors", "000003.safetensors",
    ]  # fmt: skip
    monkeypatch.undo()
    found = Batches(recipe(), range(14), chunk=2, folder=tmp_path)
    assert not found.complete() and sorted(found.done) == [*range(6)]
    assert same_bits(found.done[4].x, batches.done[4].x)
    assert found.done[4][1:] == batches.done[4][1:] == (8, 4, 1.0, batches.done[4].memory)
    batches.flush()
    assert found.complete()


# What names it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"cond_scale": 1.1},
        {"guidance": {**GUIDANCE, "teacher_scale": 0.4}},
        {"sampler": "ddim_stochastic"},
        {"levels": (*LEVELS[:3], 0.2, 0.0)},
        {"student": TEACHER},
        {"teacher": STUDENT},
        {"sampler": "euler_ancestral", "options": {"eta": 0.5}},
    ],
)
def test_whatever_changes_the_images_changes_their_name(changed):
    other = recipe(**changed)
    assert fingerprint(other) != fingerprint(recipe())
    if "options" in changed:
        assert fingerprint(other) != fingerprint(replace(other, options={"eta": 0.6}))
        assert fingerprint(other) == fingerprint(replace(other, options={"eta": 0.5}))


def test_weights_and_versions_are_part_of_the_name(monkeypatch):
    """A student that was trained on, under the same name, makes its own images."""
    student = load_model("digits:student")
    before = fingerprint(alone(student=student))
    assert before == fingerprint(alone(student=load_model("digits:student")))
    monkeypatch.setattr(kdpp, "__version__", "other")
    assert fingerprint(alone(student=student)) != before
    monkeypatch.undo()
    with torch.no_grad():
        student.network.leave.bias += 0.1
    assert fingerprint(alone(student=student)) != before


def test_an_edited_solver_has_another_name(monkeypatch):
    """What names the images is what the solver's plan does, on these levels with these options."""
    before = {name: fingerprint(alone(name)) for name in ("euler", "heun")}
    for name in before:
        assert fingerprint(alone(name)) == before[name]
    euler, heun = (kdpp.SOLVERS[name] for name in before)
    monkeypatch.setitem(
        kdpp.SOLVERS, "euler", replace(euler, steps=heun.steps, options=heun.options)
    )
    assert fingerprint(alone("euler")) == before["heun"] == fingerprint(alone("heun"))
    monkeypatch.setitem(kdpp.SOLVERS, "euler", replace(euler, cfg_pp=True))
    assert fingerprint(alone("euler")) not in before.values()


def test_settings_that_cannot_be_kept():
    """A function has no digest; without one it samples."""
    how = recipe(guidance={"teacher_scale": lambda step, sigma: 0.2})
    assert draw(how, [1]).x.isfinite().all()
    with pytest.raises(ValueError, match="numbers, texts or lists"):
        fingerprint(how)


def test_a_range_of_levels_is_no_list_of_steps():
    ranged, listed = (
        recipe(guidance={"teacher_steps": steps}) for steps in (kdpp.NoiseRange(1, 2), [1, 2])
    )
    assert fingerprint(ranged) != fingerprint(listed)
