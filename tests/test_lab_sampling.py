"""Images from seeds: by whom, in which order and after which accident makes no difference.

``python tests/test_lab_sampling.py FOLDER`` is one process of several: see `work`.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import harness_cost
import kdpp
from kdpp.lab import evaluate, processes, sampling
from kdpp.lab.models import DataOrigin, Model, ModelCard, load_model
from kdpp.lab.networks import VEDenoiser, build
from kdpp.lab.sampling import SAMPLERS, Recipe, draw, image_seeds, levels_for
from kdpp.noise import SeededNoise

GUIDANCE = {"teacher_scale": 0.5, "teacher_cfg_scale": 2.0, "renoise_eta": 0.7}
STUDENT, TEACHER = load_model("digits:student"), load_model("digits:teacher")
LEVELS = levels_for(STUDENT, 4)


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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_seed_alone(sampler):
    """Another place, other company, another global seed: the same image, by every sampler."""
    seeds = [5, 3, 2**40 + 7, 11]
    scale = 0.8 if SAMPLERS[sampler].cfg_pp else 1.5
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
    assert levels_for(bound) == levels_for(bound, 2) == (9.0, 2.0, 0.0)
    assert levels_for(bound, 3) == kdpp.digits.schedule(3)
    assert (len(levels_for(STUDENT)), len(levels_for(TEACHER))) == (5, 51)


def test_runs_share_no_seed():
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
        (lambda: recipe("eulr"), "unknown sampler 'eulr'; did you mean 'euler'"),
        (lambda: recipe("dpm_fast"), "unknown sampler 'dpm_fast'"),
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
        (lambda: image_seeds(-1, 5), "run is -1"),
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


@pytest.mark.usefixtures("written_at_once")
def test_finished_batches_are_not_computed_again(tmp_path):
    """Two batches were done: the next run makes the other three, and the same images."""
    expected = draw(recipe(), range(10), chunk=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        die_after(patch, 2)
        draw(recipe(), range(10), chunk=2, folder=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 3)
        found = draw(recipe(), range(10), chunk=2, folder=tmp_path)
    assert same_bits(found.x, expected.x) and found.evaluations == expected.evaluations
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 0)
        again = draw(recipe(), range(10), chunk=2, folder=tmp_path)
    assert same_bits(again.x, expected.x) and again.seconds == found.seconds


@pytest.mark.usefixtures("written_at_once")
@pytest.mark.parametrize(
    "change",
    [
        {"how": recipe(cond_scale=1.1)},
        {"how": recipe(guidance={**GUIDANCE, "teacher_scale": 0.4})},
        {"how": recipe("ddim_stochastic")},
        {"how": recipe(levels=(*LEVELS[:3], 0.2, 0.0))},
        {"how": recipe(student=TEACHER)},
        {"how": recipe(teacher=STUDENT)},
        {"how": recipe("euler_ancestral", options={"eta": 0.5})},
        {"seeds": range(10, 14)},  # of the same labels
        {"labels": torch.tensor([3, 3, 3, 3])},
        {"chunk": 4},
    ],
)
def test_kept_batches_of_something_else_are_not_taken(change, tmp_path):
    """Whatever changes the images, or could change their bits."""

    def images(how=recipe(), seeds=range(4), labels=None, chunk=2, folder=None):  # noqa: B008
        return draw(how, seeds, labels, chunk=chunk, folder=folder).x

    images(folder=tmp_path)
    assert same_bits(images(**change, folder=tmp_path), images(**change))


@pytest.mark.usefixtures("written_at_once")
def test_weights_are_part_of_what_is_kept(tmp_path):
    """A student that was trained on, under the same name, makes its own images."""
    student = load_model("digits:student")
    before = draw(alone(student=student), range(4), folder=tmp_path).x
    with torch.no_grad():
        student.network.leave.bias += 0.1
    after = draw(alone(student=student), range(4), folder=tmp_path).x
    assert (after - before).abs().max() > 0.01


@pytest.mark.usefixtures("written_at_once")
def test_damaged_and_foreign_files_are_passed_over(tmp_path):
    expected = draw(recipe(), range(4), chunk=2, folder=tmp_path).x
    first, second = sorted(tmp_path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:100])
    save_file({"1": torch.zeros(2, 1, 8, 8)}, second)
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert same_bits(draw(recipe(), range(4), chunk=2, folder=tmp_path).x, expected)


def test_little_work_is_held_back(tmp_path, monkeypatch):
    """Batches are written once they are worth the wait, several in one file."""
    monkeypatch.setattr(sampling, "PATIENCE", 2.5)
    shelf = sampling.Shelf(tmp_path, "key")
    for i in range(7):
        shelf.add(i, sampling.Batch(torch.full((2, 1), float(i)), sampling.Cost(1, 2, 1.0)))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["000000.safetensors", "000003.safetensors"]
    found = sampling.Shelf(tmp_path, "key").read([0, 4, 5, 6])
    assert sorted(found) == [0, 4, 5]
    assert found[4].x.tolist() == [[4.0], [4.0]] and found[4].cost == (1, 2, 1.0)
    assert not sampling.Shelf(tmp_path, "another").read([0, 4, 5])


def test_settings_that_cannot_be_kept(tmp_path):
    """A function has no digest; without a folder it needs none."""
    how = recipe(guidance={"teacher_scale": lambda step, sigma: 0.2})
    assert draw(how, [1]).x.isfinite().all()
    with pytest.raises(ValueError, match="numbers, texts or lists"):
        draw(how, [1], folder=tmp_path)


def test_a_range_of_levels_is_no_list_of_steps():
    ranged, listed = (
        recipe(guidance={"teacher_steps": steps}) for steps in (kdpp.NoiseRange(1, 2), [1, 2])
    )
    assert sampling.fingerprint(ranged) != sampling.fingerprint(listed)


# Several processes --------------------------------------------------------------------------------

RECIPES = {
    "guided": recipe(),
    "stochastic": recipe("euler_ancestral", cond_scale=1.5),
    "random": recipe(guidance={**GUIDANCE, "renoise": "random"}),
    "teacher": alone("dpmpp_2m", student=TEACHER, cond_scale=2.0),
}
COUNT, CHUNK = 22, 5  # five batches, the last one smaller: uneven shares for 2 and 3 processes


def work(folder):
    """Draw every recipe and write what this process has; then evaluate, or draw and be killed."""
    rank = os.environ.get("RANK", "0")
    images = {name: draw(how, image_seeds(0, COUNT), chunk=CHUNK) for name, how in RECIPES.items()}
    costs = [[*made.evaluations, made.compute] for made in images.values()]
    tensors = {name: made.x for name, made in images.items()}
    tensors["costs"] = torch.tensor(costs, dtype=torch.float64)
    save_file(tensors, folder / f"{rank}.safetensors")
    if "DIES" not in os.environ:
        latents = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        save_file(
            {"latents": 2 * latents, "labels": torch.arange(40) % 10}, folder / "data.safetensors"
        )
        parser = argparse.ArgumentParser()
        evaluate.add_arguments(parser)
        pair = ["digits:student", "--teacher", "digits:teacher", "--images", "20", "--seeds", "2"]
        places = ["--data", str(folder / "data.safetensors"), "--out", str(folder)]
        evaluate.run(parser.parse_args([*pair, *places]))
        return
    sampling.PATIENCE = math.inf
    if os.environ["DIES"] == rank:
        sampling.PATIENCE = 0.0
        sample, left = sampling._sample, iter(range(1))

        def mortal(*arguments):
            if next(left, None) is None:
                wait_for(folder / "kept" / "000000.safetensors")  # the other's, all in one
                os.kill(os.getpid(), signal.SIGKILL)
            return sample(*arguments)

        sampling._sample = mortal
    draw(RECIPES["guided"], image_seeds(0, COUNT), chunk=CHUNK, folder=folder / "kept")


def wait_for(path):
    """Until the file is there; half a minute at most."""
    deadline = time.monotonic() + 30.0
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def results(folder):
    """What an evaluation found, without what it took."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return [found["data"], *({**way, "timing": None} for way in found["ways"])]


def launch(folder, count, launcher="torchrun", **environment):
    """Run this file in several processes."""
    module, *flags = {
        "torchrun": ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}"],
        # What accelerate calls many GPUs is many processes; without a GPU they are the CPU's.
        "accelerate": [
            "accelerate.commands.launch", "--multi_gpu", f"--num_processes={count}",
            "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
            "--main_process_port=0",
        ],
    }[launcher]  # fmt: skip
    command = [sys.executable, "-m", module, *flags, __file__, str(folder)]
    own = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """A folder with what one process makes."""
    folder = tmp_path_factory.mktemp("one")
    work(folder)
    return folder


def test_three_processes_make_the_same_images_and_figures(by_one, tmp_path):
    """Bit for bit, in every process, at the same cost; and what is measured of them."""
    done = launch(tmp_path, 3, "torchrun")
    assert done.returncode == 0, done.stderr
    check_images(by_one, tmp_path, 3)
    assert results(tmp_path) == results(by_one)


def test_two_processes_of_which_one_is_lost(by_one, tmp_path):
    """The same images; then one is killed in its second batch: the next run finds all others."""
    done = launch(tmp_path, 2, "accelerate", DIES="1")
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr
    images = check_images(by_one, tmp_path, 2)
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 1)  # of five batches three were the first process's, one is missing
        found = draw(
            RECIPES["guided"], image_seeds(0, COUNT), chunk=CHUNK, folder=tmp_path / "kept"
        )
    assert same_bits(found.x, images["guided"])


def check_images(by_one, folder, count):
    """That every process has what one process makes, which is returned."""
    expected = load_file(by_one / "0.safetensors")
    for rank in range(count):
        found = load_file(folder / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], expected[name]) for name in expected)
    return expected


if __name__ == "__main__":
    work(Path(sys.argv[1]))
