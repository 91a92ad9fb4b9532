"""What denoisers say of themselves: schedule and kind through wrappers, marks, copies, networks."""

import copy
import threading
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch
from torch import nn

import kdpp
from kdpp.kinds import DEEPEST, holds_samples, inside, trained_range
from kdpp.rollouts import encode, mixed_rollout
from problems import (
    SHAPE,
    CFGDenoiser,
    Counted,
    NeverCalled,
    Problem,
    conditions,
    karras,
    mixture,
    seeded,
)

external = kdpp.kdiffusion.external
SIGMAS = karras(4)
X = seeded(2, *SHAPE, seed=9) * SIGMAS[0]


class LatentDiffusion(nn.Module):
    """What a CompVis checkpoint loads as: it predicts noise (or v) at a timestep."""

    def __init__(self, parameterization="eps"):
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0))
        self.parameterization = parameterization

    def forward(self, x, t, cond=None):
        return 0.3 * x

    apply_model = forward


# ------------------------------------------------------------------------------- what is inside


def within(seconds, function):
    """What the function returns, if it does in time."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"not done after {seconds} s"
    return found[0]


def circle():
    """Two denoisers that hold each other."""
    one, other = SimpleNamespace(), SimpleNamespace()
    one.model, other.inner_model = other, one
    return one


def itself():
    model = SimpleNamespace()
    model.model = model
    return model


@pytest.mark.parametrize("make", [Mock, MagicMock, itself, circle])
def test_a_model_without_an_end_has_no_range(make):
    """A mock, which has any attribute; a model that holds itself; two that hold each other."""
    assert within(5, lambda: trained_range(make())) is None
    assert not holds_samples(make())


def test_the_denoisers_inside_from_the_outside_in():
    """`model` before `inner_model`; each once; only so many."""
    inner = SimpleNamespace(sigma_min=0.1, sigma_max=torch.tensor(9.0))
    outer = SimpleNamespace(model=SimpleNamespace(inner_model=inner), inner_model=None)
    assert list(inside(outer)) == [outer, outer.model, inner]
    assert trained_range(outer) == (pytest.approx(0.1), 9.0)
    assert len(list(inside(itself()))) == 1 and len(list(inside(circle()))) == 2
    assert len(list(inside(Mock()))) == DEEPEST
    assert list(inside(None)) == []


def test_a_mark_says_what_the_model_inside_says():
    """The schedule that scripts ask for, and the kind."""
    inner = external.CompVisDenoiser(LatentDiffusion())
    marked = kdpp.OwnCFG(kdpp.LCMDenoiser(inner))
    assert torch.equal(marked.get_sigmas(4), inner.get_sigmas(4))
    assert torch.equal(marked.sigma_to_t(SIGMAS[:2]), inner.sigma_to_t(SIGMAS[:2]))
    assert trained_range(marked) == trained_range(inner) is not None
    assert kdpp.OwnCFG(kdpp.FlowDenoiser(NeverCalled())).flow is True
    plain = kdpp.OwnCFG(lambda x, sigma: x)
    assert not hasattr(plain, "flow") and not hasattr(plain, "sigma_max")


# ------------------------------------------------------------------------------- marks and copies


@pytest.mark.parametrize("model", [None, 3, "a checkpoint.safetensors"])
def test_what_cannot_be_called_cannot_be_marked(model):
    with pytest.raises(TypeError, match=f"OwnCFG takes a denoiser.* not {model!r}"):
        kdpp.OwnCFG(model)
    if model is not None:
        with pytest.raises(TypeError, match=f"uncond_denoised is {model!r}"):
            kdpp.OwnCFG(NeverCalled(), model)


class Guided(CFGDenoiser):
    """Own CFG whose unconditional estimate is a method's."""

    def latest(self):
        return self.uncond_denoised


def unconditional(marked):
    """What it says of its latest call, a call for condition 2."""
    cond, uncond = conditions(2)
    marked(X, X.new_ones(2), cond=cond, uncond=uncond, cond_scale=2.0)
    return marked.uncond_denoised()


@pytest.mark.parametrize("inpainted", [False, True], ids=["plain", "inpainted"])
def test_a_deep_copy_of_a_marked_model_reads_its_own_estimate(inpainted):
    """Not the original's, whose latest call was another."""
    network = Guided(mixture(0))
    marked = kdpp.OwnCFG(network, network.latest)
    if inpainted:
        image, mask = seeded(2, *SHAPE, seed=3), torch.tensor([[0.0, 1.0], [1.0, 0.5]])
        marked = kdpp.inpaint(marked, image, mask, image)
    expected = unconditional(marked)
    twin = copy.deepcopy(marked)
    assert isinstance(twin, kdpp.OwnCFG)
    network.uncond_denoised = torch.full_like(X, torch.nan)
    assert torch.equal(unconditional(twin), expected)
    assert marked.uncond_denoised().isnan().any()  # and the copy's call did not reach it
    for one in twin.modules():
        assert one is not network and one is not marked


class Itself(kdpp.OwnCFG):
    """A mark whose own method gives the unconditional estimate."""

    def __init__(self):
        super().__init__(Guided(mixture(0)), self.latest)

    def latest(self):
        return self.model.uncond_denoised


def test_a_deep_copy_of_a_mark_that_refers_to_itself():
    """The copy refers to the copy."""
    marked = Itself()
    twin = copy.deepcopy(marked)
    assert type(twin) is Itself and twin.uncond_denoised.__self__ is twin
    expected = unconditional(marked)
    assert torch.equal(unconditional(twin), expected)


def test_a_deep_copy_that_would_read_the_originals_estimate_is_refused():
    """A plain function is not copied with the model; nor is one inside an inpainted model."""
    network = Guided(mixture(0))
    marked = kdpp.OwnCFG(network, lambda: network.uncond_denoised)
    image = seeded(2, *SHAPE, seed=3)
    inpainted = kdpp.inpaint(marked, image, torch.ones(1), image)
    pair = kdpp.TeacherGuidedDenoiser(marked, mixture(1))
    for one in (marked, inpainted, pair):
        with pytest.raises(TypeError, match="would read the unconditional estimate of the orig"):
            copy.deepcopy(one)
        copy.copy(one)  # shares the network, so it reads the right one
    copy.deepcopy(kdpp.OwnCFG(network))


# ------------------------------------------------------------------------------- bare networks


def alone(model):
    """The model as the student of another."""
    return kdpp.TeacherGuidedDenoiser(model, NeverCalled(), teacher_scale=0.0)


PLACES = {
    "student": alone,
    "teacher": lambda model: kdpp.TeacherGuidedDenoiser(NeverCalled(), model),
    "one of several teachers": lambda model: kdpp.Teacher(model),
    "marked": lambda model: alone(kdpp.OwnCFG(model)),
    "encode": lambda model: encode(model, X, SIGMAS[:-1].flip(0)),
    "mixed_rollout": lambda model: mixed_rollout(model, NeverCalled(), X, SIGMAS, switch=0),
    "inpaint": lambda model: kdpp.inpaint(model, X, torch.ones(1), X),
    "as_flow": kdpp.as_flow,
    "LCM": kdpp.LCMDenoiser,
    "w": kdpp.GuidanceConditioned,
    "borrowed": lambda model: kdpp.Borrowed(model, device="cpu"),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_network_that_predicts_noise_is_no_denoiser(place):
    """It is recognised wherever a denoiser is taken, and the wrapper that it needs is named."""
    with pytest.raises(TypeError, match=r"LatentDiffusion.*predict noise at.*CompVisDenoiser\(mo"):
        place(LatentDiffusion())
    with pytest.raises(TypeError, match=r"predict v at a timestep.*CompVisVDenoiser\(model\)$"):
        place(LatentDiffusion("v"))


def test_denoisers_that_have_a_networks_attributes_pass():
    """Wrapped as the message says; one that knows σ itself; a function; as an x0 model."""
    network = LatentDiffusion()
    own = LatentDiffusion()
    own.sigma_to_t = lambda sigma: sigma
    wrapped = external.CompVisDenoiser(network)
    for model in (wrapped, kdpp.LCMDenoiser(wrapped), own, network.forward):
        alone(model)
    alone(kdpp.X0Denoiser(network, wrapped.sigma_to_t))
    kdpp.FlowDenoiser(network)


def test_the_networks_message_is_followed():
    """Wrapped so, it samples what the ε-network means: D = x - σ ε."""
    network = LatentDiffusion()
    model = Counted(external.CompVisDenoiser(network).double())
    problem = Problem(student=model)
    kdpp.sample_euler_tg(
        problem.guided(teacher_steps=0), X, SIGMAS, {"cond": conditions(2)[0]}, disable=True
    )
    for call in model.calls:
        sigma = call.sigma.reshape(-1, 1, 1, 1)
        expected = call.x - sigma * 0.3 * call.x / (1 + sigma**2).sqrt()
        torch.testing.assert_close(call.output, expected)
