"""Two models in the memory of one: weights shared, lent for k steps, quantised.

The networks are the digits' own. What needs peft, torchao or bitsandbytes (extra: memory), or a
CUDA device, is skipped without it.
"""

import contextlib
import copy
import functools
import pickle
import re
import types
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import kdpp
import needs
from kdpp.digits import NULL_CLASS, load_student, load_teacher, schedule
from kdpp.kdiffusion import external
from kdpp.memory import Borrowed, borrowed_in, without_adapters
from problems import relative, seeded

SIGMAS = torch.tensor(schedule(4))
LABELS = torch.arange(6)
ADAPTED = ["time.0", "time.2", "mlp.0", "mlp.2", "modulation", "enter", "leave"]


def denoiser(network=None):
    """The digits' teacher as a denoiser, or another network."""
    return external.CompVisDenoiser(load_teacher() if network is None else network)


def noise(device="cpu"):
    return (seeded(6, 1, 8, 8, seed=0, dtype=torch.float32) * SIGMAS[0]).to(device)


def extra_args(device="cpu"):
    labels = LABELS.to(device)
    return {"cond": labels, "uncond": torch.full_like(labels, NULL_CLASS)}


def guided(student, teacher, device="cpu"):
    """Two of four steps guided, the teacher with CFG, and more than a touch of it."""
    model = kdpp.TeacherGuidedDenoiser(
        student, teacher, teacher_scale=0.4, teacher_steps=2, teacher_cfg_scale=2.0
    )
    torch.manual_seed(3)
    x, levels = noise(device), SIGMAS.to(device)
    return kdpp.sample_dpmpp_2s_ancestral_tg(model, x, levels, extra_args(device), disable=True)


def pointers(module):
    """Where a module's weights lie."""
    return {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}


def size(module):
    """Bytes of a module's weights, those of quantised tensors' parts included."""
    seen = {}

    def add(tensor):
        if hasattr(tensor, "__tensor_flatten__"):  # torchao
            for part in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, part))
            return
        if hasattr(tensor, "quant_state"):  # bitsandbytes
            add(tensor.quant_state.absmax)
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()

    for tensor in (*module.parameters(), *module.buffers()):
        add(tensor)
    return sum(seen.values())


# ---------------------------------------------------------------------- adapters on and off


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="needs peft (extra: memory)")


def randomised(module, seed=1):
    """LoRA starts as no change at all; give every adapter random numbers, and freeze nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2)
    return module


class Linear(nn.Module):
    """A denoiser of one layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, sigma):
        return self.layer(x)


def lora(peft, **settings):
    return peft.LoraConfig(r=1, target_modules=ADAPTED, **settings)


@pytest.fixture
def adapted(peft):
    """A LoRA student as a denoiser: the digits' teacher with adapters in every linear layer."""
    return denoiser(randomised(peft.get_peft_model(load_teacher(), lora(peft))))


def layers(module):
    return [m for m in module.modules() if hasattr(m, "lora_A")]


def test_adapters_off_is_the_base_model_bit_for_bit(adapted):
    """Samples are those of two separate models; the teacher says what its base says."""
    base, separate = denoiser(), copy.deepcopy(adapted)
    shared = guided(adapted, without_adapters(adapted))
    assert torch.equal(shared, guided(separate, base))
    assert relative(shared, guided(base, base)) > 0.01  # and the adapters do something
    assert relative(shared, guided(separate, separate)) > 0.01


def test_weights_are_there_once(adapted):
    """Student and teacher together are one model and its adapters."""
    model = kdpp.TeacherGuidedDenoiser(adapted, without_adapters(adapted))
    assert pointers(model) == pointers(adapted)
    assert size(model) == size(adapted) <= 1.05 * size(denoiser())


@pytest.mark.parametrize("way", ["inject", "modules_to_save", "dora"])
def test_every_way_that_peft_adapts(peft, way):
    """Layers injected in place; whole layers trained anew; magnitudes (DoRA)."""
    network = load_teacher()
    if way == "inject":
        network = peft.inject_adapter_in_model(lora(peft), network)
    else:
        saved = {"modules_to_save": ["label"]} if way == "modules_to_save" else {"use_dora": True}
        network = peft.get_peft_model(network, lora(peft, **saved))
    student = denoiser(randomised(network))
    if way == "modules_to_save":
        with torch.no_grad():
            network.base_model.model.label.modules_to_save["default"].weight.normal_()
    separate = copy.deepcopy(student)
    assert torch.equal(guided(student, without_adapters(student)), guided(separate, denoiser()))


def test_adapters_of_a_diffusers_model(peft):
    """Adapters that diffusers put there (add_adapter, as load_lora_weights does)."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, cross_attention_dim=8,
        attention_head_dim=4, norm_num_groups=4, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).requires_grad_(False)  # fmt: skip

    class Epsilon(nn.Module):
        alphas_cumprod = load_teacher().alphas_cumprod

        def __init__(self):
            super().__init__()
            self.network = network

        def apply_model(self, x, t, cond):
            words = torch.nn.functional.one_hot(cond % 8, 8)[:, None].to(x)
            return self.network(x, t, words).sample

    student = denoiser(Epsilon())
    base = copy.deepcopy(student)
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"]))
    randomised(network)
    separate = copy.deepcopy(student)
    shared = guided(student, without_adapters(student))
    assert torch.equal(shared, guided(separate, base))
    assert relative(shared, guided(base, base)) > 1e-3


def state(module):
    """Everything that switching might touch."""
    flags = [(la.disable_adapters, list(la.active_adapters)) for la in layers(module)]
    return flags, [weight.requires_grad for weight in module.parameters()]


@pytest.mark.parametrize("before", ["on", "off", "one off", "two active", "frozen"])
def test_the_state_before_comes_back(peft, adapted, before):
    """Whatever was switched on, and what can be trained, is so again, after an exception too."""
    network = adapted.inner_model
    if before == "off":
        network.base_model.disable_adapter_layers()
    if before == "one off":
        layers(adapted)[1].enable_adapters(False)
    if before == "two active":
        network.add_adapter("second", lora(peft))
        randomised(network, seed=2)
        network.base_model.set_adapter(["default", "second"])
    if before == "frozen":
        network.requires_grad_(False)
    was, x, sigma = state(adapted), noise(), torch.full((6,), 2.0)
    expected = adapted(x, sigma, cond=LABELS)
    teacher = without_adapters(adapted)
    assert torch.equal(teacher(x, sigma, cond=LABELS), denoiser()(x, sigma, cond=LABELS))
    assert state(adapted) == was
    with pytest.raises(ValueError, match="must be"):
        teacher(x[:, :, :4], sigma, cond=LABELS)
    assert state(adapted) == was
    assert torch.equal(adapted(x, sigma, cond=LABELS), expected)


def test_layers_are_looked_up_once(adapted, monkeypatch):
    """A call walks no modules."""
    teacher = without_adapters(adapted)
    monkeypatch.setattr(nn.Module, "modules", None)
    monkeypatch.setattr(nn.Module, "named_modules", None)
    teacher(noise(), torch.full((6,), 2.0), cond=LABELS)


def test_a_switched_model_compiles(peft):
    """Student, teacher, student in one graph, and the switch is back."""
    base = Linear()
    student = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["layer"]))
    teacher, x = without_adapters(randomised(student)), noise()

    def three(x):
        return student(x, 1.0), teacher(x, 1.0), student(x, 1.0)

    with torch.no_grad():
        expected = three(x)
        compiled = torch.compile(three, backend="eager", fullgraph=True)(x)
        assert torch.equal(compiled[1], base(x, 1.0))
    assert all(map(torch.equal, compiled, expected))
    assert not any(layer.disable_adapters for layer in layers(student))


def test_adapters_that_cannot_be_switched_off_are_refused(peft, adapted):
    """None, merged before or after, trained with the base's biases; no module; unmarked CFG."""
    with pytest.raises(ValueError, match="holds no adapters"):
        without_adapters(denoiser())
    with pytest.raises(TypeError, match=r"nn\.Module"):
        without_adapters(lambda x, sigma: x)
    teacher, before = without_adapters(adapted), state(adapted)
    adapted.inner_model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights"):
        without_adapters(adapted)
    merged = [weight.clone() for weight in adapted.parameters()]
    with pytest.raises(ValueError, match="merged into the weights"):
        teacher(noise(), torch.full((6,), 2.0), cond=LABELS)
    assert state(adapted) == before
    assert all(map(torch.equal, merged, adapted.parameters()))  # peft would unmerge in silence
    biased = peft.get_peft_model(load_teacher(), lora(peft, bias="lora_only"))
    with pytest.raises(ValueError, match="bias='lora_only'"):
        without_adapters(denoiser(biased))
    with pytest.raises(TypeError, match="own CFG"):
        without_adapters(OwnGuidance(adapted))


class OwnGuidance(nn.Module):
    """A denoiser that does its own CFG, without batching."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model

    def forward(self, x, sigma, uncond, cond, cond_scale):
        without, by = (self.inner_model(x, sigma, cond=c) for c in (uncond, cond))
        return torch.lerp(without, by, cond_scale)


def test_what_the_denoiser_says_the_teacher_says(adapted):
    """The schedule; the range, from inside too; flow; the mark of own CFG."""
    teacher = without_adapters(adapted)
    assert teacher.sigma_max == adapted.sigma_max
    t = teacher.sigma_to_t(torch.tensor([1.0]))
    assert torch.equal(t, adapted.sigma_to_t(torch.tensor([1.0])))
    assert not getattr(teacher, "flow", False)
    model = kdpp.TeacherGuidedDenoiser(adapted, teacher, renoise=1e4)
    with pytest.warns(UserWarning, match="trained range"):
        kdpp.sample_euler_tg(model, noise(), SIGMAS, extra_args(), disable=True)

    flowing = without_adapters(kdpp.FlowDenoiser(adapted.inner_model))
    assert flowing.flow is True
    marked = kdpp.OwnCFG(OwnGuidance(adapted))
    shared = guided(marked_with(marked), without_adapters(marked))
    base = kdpp.OwnCFG(OwnGuidance(denoiser()))
    assert torch.equal(shared, guided(marked_with(copy.deepcopy(marked)), base))


def marked_with(marked):
    """A student that needs no cond_scale of the sampler."""
    return kdpp.OwnCFG(lambda x, sigma, **rest: marked(x, sigma, **(rest | {"cond_scale": 1.5})))


# ------------------------------------------------------------- a second model, for k steps only


class Inside(nn.Module):
    """A denoiser that hands everything on to another."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, sigma, **extra_args):
        return self.model(x, sigma, **extra_args)


def loader(made, network=load_teacher):
    """A function that loads a denoiser, and remembers what it made without keeping it."""

    def load():
        loaded = denoiser(network())
        made.append(weakref.ref(loaded))
        return loaded

    return load


def alive(made):
    return [ref() is not None for ref in made]


@pytest.mark.parametrize(
    ("steps", "there"), [(1, "1000"), ([1, 2], "0110"), ([0, 2], "1110"), (0, "0000")]
)
def test_a_run_borrows_from_the_first_guided_step_to_the_last(steps, there):
    """There at the student's call of these steps, inside a wrapper too; never without any."""
    made, seen, network = [], [], denoiser(load_student())
    settings = {"teacher_scale": 0.4, "teacher_cfg_scale": 2.0, "teacher_steps": steps}

    def student(x, sigma, cond):
        seen.append(any(alive(made)))
        return network(x, sigma, cond=cond)

    def sample(teacher):
        torch.manual_seed(3)
        model = kdpp.TeacherGuidedDenoiser(student, teacher, **settings)
        assert not any(alive(made))  # neither making it nor wrapping it loads
        return kdpp.sample_lcm_tg(model, noise(), SIGMAS, extra_args(), disable=True)

    teacher, guided_at_all = Inside(Borrowed(loader(made), like=network)), "1" in there
    images = sample(teacher)
    assert seen == [digit == "1" for digit in there]
    assert alive(made) == [False] * guided_at_all
    assert torch.equal(sample(teacher), images)
    assert alive(made) == [False] * 2 * guided_at_all
    assert torch.equal(sample(denoiser()), images)


@pytest.mark.parametrize("way", ["load", "move"])
def test_sampling_with_a_borrowed_teacher(way):
    """The samples are those of two models side by side, bit for bit."""
    student = denoiser(load_student())
    ways = {"load": lambda: Borrowed(denoiser, like=student),
            "move": lambda: Borrowed(denoiser(), device="cpu")}  # fmt: skip
    teacher = ways[way]()
    assert torch.equal(guided(student, teacher), guided(student, denoiser()))
    teacher.release()


def test_fetch_and_release_may_be_repeated():
    """A second fetch loads nothing, a call fetches by itself, a second release does nothing."""
    made = []
    teacher = Borrowed(loader(made), like=denoiser(load_student()))
    teacher.release()
    teacher.fetch()
    teacher.fetch()
    teacher(noise(), SIGMAS[[0] * 6], cond=LABELS)
    assert alive(made) == [True]
    teacher.release()
    teacher.release()
    assert alive(made) == [False]
    teacher(noise(), SIGMAS[[0] * 6], cond=LABELS)
    assert alive(made) == [False, True]
    teacher.release()
    assert alive(made) == [False, False]


def test_a_run_that_fails_gives_the_teacher_back():
    """By the student's exception between two guided steps."""
    made, calls, network = [], [], denoiser(load_student())

    def student(x, sigma, cond):
        calls.append(alive(made))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return network(x, sigma, cond=cond)

    teacher = Borrowed(loader(made), like=network)
    model = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_steps=2, teacher_cfg_scale=2.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        kdpp.sample_lcm_tg(model, noise(), SIGMAS, extra_args(), disable=True)
    assert calls == [[True], [True]] and alive(made) == [False]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ("a file", TypeError, "must return a denoiser"),
        (kdpp.OwnCFG(nn.Identity()), TypeError, "outermost wrapper"),
        (kdpp.FlowDenoiser(nn.Identity()), ValueError, "a flow model trained on an unknown range"),
        (nn.Identity(), ValueError, "give an object with the loaded one's flow"),
    ],
)
def test_a_loader_that_fails_can_be_tried_again(returned, error, message):
    """By an exception, or by what it returns; the next fetch starts from nothing."""
    student, attempts = denoiser(load_student()), []

    def load():
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("no such file")
        return returned if len(attempts) == 2 else denoiser()

    teacher = Borrowed(load, like=student)
    with pytest.raises(OSError, match="no such file"):
        teacher.fetch()
    with pytest.raises(error, match=message):
        teacher(noise(), SIGMAS[[0] * 6], cond=LABELS)
    expected = denoiser()(noise(), SIGMAS[[0] * 6], cond=LABELS)
    assert torch.equal(teacher(noise(), SIGMAS[[0] * 6], cond=LABELS), expected)
    assert len(attempts) == 3


def test_loading_draws_nothing_from_the_samplers_stream():
    """A new network draws its first weights; the sampler's next numbers are as without it."""
    like = types.SimpleNamespace(flow=False)
    teacher = Borrowed(lambda: nn.Linear(8, 8), like=like)
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    teacher.fetch()
    assert torch.equal(torch.randn(3), expected)


def test_borrowed_weights_belong_to_nothing():
    """What holds the teacher does not move, convert, list or save its weights."""
    source, student = denoiser(), denoiser(load_student())
    for teacher in (Borrowed(source, device="meta"), Borrowed(lambda: source, like=student)):
        model = kdpp.TeacherGuidedDenoiser(student, kdpp.OwnCFG(teacher))
        assert pointers(model) == pointers(student)
        assert model.state_dict().keys() == {f"student.{key}" for key in student.state_dict()}
        model.double()
        teacher.fetch()
        assert {weight.dtype for weight in source.parameters()} == {torch.float32}
        assert pointers(model) == pointers(student)
        model.float()


def test_a_moved_teacher_leaves_the_module_as_it_was():
    """Copies on the device serve the calls and go; the module never leaves the CPU."""
    source = denoiser()
    before = pointers(source)
    teacher = Borrowed(source, device="meta")
    teacher.fetch()
    copies = [weakref.ref(weight) for weight in teacher._here[0].weights.values()]
    assert {ref().device.type for ref in copies} == {"meta"} and len(copies) == len(before)
    x, sigma, labels = (tensor.to("meta") for tensor in (noise(), SIGMAS[[0] * 6], LABELS))
    with torch.no_grad():
        assert teacher(x, sigma, cond=labels).device.type == "meta"
    with pytest.raises(ValueError, match="must be"):
        teacher(x[:, :, :4], sigma, cond=labels)
    assert pointers(source) == before and all(w.device.type == "cpu" for w in source.parameters())
    teacher.release()
    assert not any(ref() is not None for ref in copies)
    assert torch.equal(source(noise(), SIGMAS[[0] * 6], cond=LABELS),
                       denoiser()(noise(), SIGMAS[[0] * 6], cond=LABELS))  # fmt: skip


def test_a_teacher_on_the_cpu_is_used_where_it_is():
    """No copy where there is nothing to bring."""
    source = denoiser()
    teacher = Borrowed(source, device="cpu")
    teacher.fetch()
    assert teacher._here == [source]


def test_borrowed_inside_other_denoisers():
    """A run finds it in any wrapper; what needs nothing brought in has none."""
    student = denoiser(load_student())
    teacher = Borrowed(denoiser(), device="meta")
    flow = Borrowed(kdpp.FlowDenoiser(load_teacher()), device="meta")
    assert borrowed_in(teacher) == [teacher]
    assert borrowed_in(kdpp.OwnCFG(teacher)) == borrowed_in(kdpp.as_flow(teacher)) == [teacher]
    assert borrowed_in(kdpp.LCMDenoiser(teacher)) == [teacher]
    assert borrowed_in(kdpp.as_ve(flow)) == [flow]
    assert borrowed_in(student) == borrowed_in(lambda x, sigma: x) == []


def test_it_says_what_its_denoiser_says():
    """Before anything is loaded or moved: schedule and kind, of the module or of `like`."""
    student = denoiser(load_student())
    flow = types.SimpleNamespace(flow=True)
    for teacher in (Borrowed(student, device="meta"), Borrowed(denoiser, like=student)):
        assert teacher.sigma_max == float(student.sigma_max)
        assert teacher.sigma_min == float(student.sigma_min)
        assert torch.equal(teacher.sigma_to_t(SIGMAS[:2]), student.sigma_to_t(SIGMAS[:2]))
        assert not getattr(teacher, "flow", False)
    inside = Borrowed(denoiser, like=kdpp.OwnCFG(student))
    assert inside.sigma_max == float(student.sigma_max)
    assert Borrowed(denoiser, like=flow).flow is True
    assert not hasattr(Borrowed(denoiser, like=flow), "sigma_max")
    with pytest.raises(ValueError, match="both be flow models"):
        kdpp.TeacherGuidedDenoiser(student, Borrowed(denoiser, like=flow))
    half = Borrowed(denoiser, like=copy.deepcopy(student).half())
    half.fetch()  # a schedule rounded to 16 bits is the same schedule


@pytest.mark.parametrize(
    ("factor", "refused"), [(1.0, False), (1.004, False), (1.05, True), (0.8, True), (2.0, True)]
)
def test_like_says_the_loaded_ones_range(factor, refused):
    """Up to the rounding of 16 bits, at either end; another schedule is found when it is loaded."""
    low, high = (float(bound) for bound in (denoiser().sigma_min, denoiser().sigma_max))
    for ends in ((low * factor, high), (low, high * factor)):
        teacher = Borrowed(
            denoiser, like=types.SimpleNamespace(sigma_min=ends[0], sigma_max=ends[1])
        )
        if refused:
            with pytest.raises(
                ValueError, match=r"loaded denoiser is a VE model trained on \[0\.029"
            ):
                teacher.fetch()
        else:
            teacher.fetch()


def weights_times(factor, network):
    """Changes every parameter."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(factor)


def copied(teacher):
    return copy.deepcopy(teacher)


def pickled(teacher):
    return pickle.loads(pickle.dumps(teacher))


@pytest.mark.parametrize("twin_of", [copied, pickled])
@pytest.mark.parametrize("there", [False, True], ids=["away", "there"])
def test_a_copy_has_weights_of_its_own(there, twin_of):
    """A deep or pickled copy asks the network that it holds, and starts without it there."""
    source = denoiser()
    teacher = Borrowed(source, device="cpu")
    call = functools.partial(teacher.forward, noise(), SIGMAS[[0] * 6], cond=LABELS)
    expected = call()
    if not there:
        teacher.release()
    twin = twin_of(teacher)
    assert twin._here == [] and len(teacher._here) == there
    weights_times(0.5, source)
    assert torch.equal(twin(noise(), SIGMAS[[0] * 6], cond=LABELS), expected)
    weights_times(0.0, twin.source)
    assert not torch.equal(call(), expected) and call().abs().max() > 0
    assert not pointers(twin.source) & pointers(source)
    assert twin.like is twin.source and twin.sigma_max == teacher.sigma_max
    assert pointers(twin) == set()  # still a part of nothing


def test_a_copy_of_a_pair_has_a_teacher_of_its_own():
    """The wrapper's copy samples as the wrapper did, whatever becomes of the first teacher."""
    source = denoiser()
    student = denoiser(load_student())
    pair = kdpp.TeacherGuidedDenoiser(student, Borrowed(source, device="cpu"))
    twin = copy.deepcopy(pair)
    weights_times(0.0, source)
    taught = twin.teachers[0].denoiser
    assert torch.equal(guided(student, taught), guided(student, denoiser()))
    assert borrowed_in(twin) == [taught]


def test_a_copy_of_one_that_loads_loads_for_itself():
    """The function is the same; what one has loaded the other has not."""
    made, student = [], denoiser(load_student())
    teacher = Borrowed(loader(made), like=student)
    teacher.fetch()
    twin = copy.deepcopy(teacher)
    assert twin.source is teacher.source and len(made) == 1
    twin.fetch()
    teacher.release()
    assert alive(made) == [False, True]
    twin.release()
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"local object|loader"):
        pickle.dumps(teacher)  # Python's own words: a function inside another


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Borrowed("teacher.safetensors"), TypeError, "or a function that loads one"),
        (lambda: Borrowed(load_teacher), TypeError, "needs like="),
        (lambda: Borrowed(denoiser, like=denoiser(), device="cpu"), TypeError, "takes no device"),
        (lambda: Borrowed(denoiser(), like=denoiser()), TypeError, "says itself what it is"),
        (lambda: Borrowed(kdpp.OwnCFG(denoiser()), device="cpu"), TypeError, "outermost wrapper"),
        (lambda: Borrowed(denoiser().to("meta"), device="cpu"), ValueError, "lies on meta"),
    ],
)
def test_bad_arguments(make, error, message):
    """Before any work."""
    with pytest.raises(error, match=message):
        make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_no_cuda():
    """Asked for it is refused; not asked for, the CPU."""
    with pytest.raises(ValueError, match="finds no CUDA"):
        Borrowed(denoiser(), device="cuda")
    teacher = Borrowed(source := denoiser())
    teacher.fetch()
    assert teacher._here == [source]


class FakeCuda:
    """Streams that only write down what is asked of them, in order; tensors stay on the CPU."""

    def __init__(self, monkeypatch):
        self.log, self.on, empty = [], "main", torch.empty_like
        copy_ = torch.Tensor.copy_

        def room(like, device, requires_grad):
            self.log.append((self.on, "room"))
            return empty(like, requires_grad=requires_grad)

        def copied(target, source, non_blocking=False):
            self.log.append((self.on, "copy" if non_blocking else "blocking copy"))
            return copy_(target, source)

        monkeypatch.setattr(torch, "empty_like", room)
        monkeypatch.setattr(torch.Tensor, "copy_", copied)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda w, s: self.note(f"keep {s.name}"))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda weight: self.pinned(weight))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream(self.on))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "stream", self.within)

    def note(self, what):
        self.log.append((self.on, what))

    def pinned(self, weight):
        self.note("pin")
        return weight.clone()

    def stream(self, name):
        say = self.log.append
        return types.SimpleNamespace(
            name=name,
            wait_stream=lambda other: say((name, f"waits for {other.name}")),
            wait_event=lambda event: say((name, f"waits for {event}")),
            record_event=lambda: say((name, "event")) or f"{name}'s event",
        )

    @contextlib.contextmanager
    def within(self, stream):
        self.on, before = stream.name, self.on
        yield
        self.on = before


def test_the_order_of_work_on_cuda(monkeypatch):
    """Pinned once; room from the computing stream; copies beside it, after what it had queued;
    a call waits for their arrival, on the device."""
    source = denoiser()
    count = len([*source.parameters(), *source.buffers()])
    expected = source(noise(), SIGMAS[[0] * 6], cond=LABELS)
    fake = FakeCuda(monkeypatch)
    teacher = Borrowed(source)
    assert fake.log == [("main", "pin")] * count
    for _ in range(2):
        fake.log.clear()
        teacher.fetch()
        teacher.fetch()
        asked, fake.log[:] = list(fake.log), []
        assert asked == [
            *[("main", "room")] * count,
            ("side", "waits for main"),
            *[("side", "copy"), ("side", "keep side")] * count,
            ("side", "event"),
        ]
        answer = teacher(noise(), SIGMAS[[0] * 6], cond=LABELS)
        assert fake.log == [("main", "waits for side's event")]
        assert torch.equal(answer, expected)
        teacher.release()
    fake.log.clear()
    twin = copy.deepcopy(teacher)  # torch copies pinned weights to memory that is not
    assert fake.log.count(("main", "pin")) == count
    assert torch.equal(twin(noise(), SIGMAS[[0] * 6], cond=LABELS), expected)


@needs.cuda
def test_cuda_memory_is_the_students_outside_the_guided_steps():
    """Not there before, there for the steps, gone after; the samples are those of two models."""
    student, source = denoiser(load_student()).cuda(), denoiser()
    expected = guided(student, copy.deepcopy(source).cuda(), "cuda")
    teacher = Borrowed(source)
    assert all(weight.is_pinned() for weight in source.parameters())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert torch.equal(guided(student, teacher, "cuda"), expected)
    assert torch.cuda.max_memory_allocated() >= before + size(source)
    teacher.release()
    assert torch.cuda.memory_allocated() == before


@needs.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_cuda_copies_overlap_and_the_host_does_not_wait():
    """The copy arrives while work queued after `fetch` is still running; nothing synchronises."""
    layers = [nn.Linear(2048, 2048) for _ in range(8)]
    teacher = Borrowed(nn.Sequential(*layers).requires_grad_(False))
    x = torch.randn(4096, 4096, device="cuda")
    busy = torch.cuda.Event()
    y = x @ x
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher.fetch()
        for _ in range(400):
            torch.mm(x, x, out=y)
        busy.record()
        while not teacher._here[0].arrived.query():
            pass
        assert not busy.query()
        teacher._here[0](torch.randn(2, 2048, device="cuda"))
        teacher.release()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs.cuda
def test_cuda_room_given_back_unused_is_not_written_to():
    """Fetched and released without a call: what takes the room next keeps its numbers."""
    teacher = Borrowed(nn.Linear(8192, 8192, bias=False).requires_grad_(False))
    for _ in range(5):
        teacher.fetch()
        teacher.release()
        taken = torch.full((8192, 8192), 7.0, device="cuda")
        torch.cuda.synchronize()
        assert bool((taken == 7.0).all())
        del taken


# ------------------------------------------------------------------------ 8 and 4 bits


def in_8_bits(network):
    library = pytest.importorskip("torchao.quantization", reason="needs torchao (extra: memory)")
    library.quantize_(network, library.Int8WeightOnlyConfig())
    return network


def in_4_bits(network):
    library = pytest.importorskip("bitsandbytes.nn", reason="needs bitsandbytes (extra: memory)")
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                small = library.Linear4bit(
                    layer.in_features, layer.out_features, quant_type="nf4", device="meta"
                )
                small.weight = library.Params4bit(layer.weight.data, False, quant_type="nf4")
                small.bias = layer.bias
                setattr(parent, name, small.to("cpu"))
    return network


@pytest.mark.parametrize(
    ("quantised", "share", "estimate", "sample"),
    [(in_8_bits, 0.27, 0.004, 0.004), (in_4_bits, 0.15, 0.05, 0.05)],
)
def test_a_quantised_teacher(quantised, share, estimate, sample):
    """Its weights take the share of float32 stated, its estimates and samples are that close."""
    student, whole = denoiser(load_student()), denoiser()
    teacher = denoiser(quantised(load_teacher()))
    assert size(teacher) < share * size(whole)
    x, sigma = noise(), SIGMAS[[1] * 6]
    errors = (
        relative(teacher(x, sigma, cond=LABELS), whole(x, sigma, cond=LABELS)),
        relative(guided(student, teacher), guided(student, whole)),
    )
    assert 0 < errors[0] < estimate and 0 < errors[1] < sample, errors


def test_a_teacher_in_8_bits_can_be_borrowed():
    """Its weights are tensors of another kind: they go to the device whole; the CPU keeps them."""
    source = denoiser(in_8_bits(load_teacher()))
    teacher = Borrowed(source, device="meta")
    teacher.fetch()
    kinds = {type(weight) for weight in teacher._here[0].weights.values()}
    assert len(kinds) == 2 and torch.Tensor in kinds
    assert {weight.device.type for weight in teacher._here[0].weights.values()} == {"meta"}
    teacher.release()
    assert {weight.device.type for weight in source.parameters()} == {"cpu"}


def test_weights_that_hold_more_than_their_numbers_cannot_be_copied():
    """bitsandbytes' scales hang at the parameter; a copy would lose them."""
    with pytest.raises(ValueError, match="Params4bit"):
        Borrowed(denoiser(in_4_bits(load_teacher())), device="meta")


# ------------------------------------------------------------------ the benchmark, the page


@pytest.fixture
def benchmark(peft, monkeypatch):
    """benchmarks/memory.py, with networks at which it says nothing."""
    pytest.importorskip("torchao", reason="needs torchao (extra: memory)")
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (extra: memory)")
    import memory as benchmark

    monkeypatch.setattr(benchmark, "LARGE", (64, 64, 1))
    monkeypatch.setattr(benchmark, "MANY", (64, 64, 3))
    return benchmark


def test_the_benchmark_runs(benchmark):
    """Every way that is timed gets a ratio; every way whose memory is read samples."""
    assert all(0 < ratio < 100 for ratio in benchmark.time_ratios(1).values())
    for case in benchmark.CASES.values():
        assert benchmark.sampler(case())().isfinite().all()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about memory read from /proc")
def test_the_benchmark_reads_memory(benchmark):
    """A tensor of 64 MB is in use while it is there, and in the peak until that is asked for."""
    before = benchmark.now()
    benchmark.peak()
    tensor = torch.ones(2**24)
    assert benchmark.now() - before == pytest.approx(2**26, rel=0.1)
    del tensor
    assert benchmark.now() - before < 2**23
    assert benchmark.peak() - before == pytest.approx(2**26, rel=0.1)
    assert benchmark.peak() - before < 2**23


def test_the_page_says_what_runs():
    """Every example of docs/memory.md runs, one after the other."""
    pytest.importorskip("peft", reason="needs peft (extra: memory)")
    pytest.importorskip("torchao", reason="needs torchao (extra: memory)")
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (extra: memory)")
    page = Path(__file__).parents[1] / "docs" / "memory.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 4
    variables = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), variables)
