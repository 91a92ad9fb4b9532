"""Networks of diffusers as denoisers: the formula of each, levels, experts, and what is refused."""

import subprocess
import sys

import pytest
import torch

import kdpp
import needs

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
pytest.importorskip("transformers", reason="needs transformers, for the text encoders")

import tiny_pipelines as tiny  # noqa: E402
from kdpp.checkpoints import networks  # noqa: E402
from kdpp.checkpoints.networks import (  # noqa: E402
    CompVisModel,
    Experts,
    NormKeepingCFG,
    as_denoiser,
    flow_sigmas,
    scheduler_sigmas,
    trailing_sigmas,
)

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, TEXT = drawn(2, 4, 8, 12), drawn(2, 5, 16, seed=1)
COND = {"encoder_hidden_states": TEXT}


def test_importing_kdpps_checkpoints_imports_neither_diffusers_nor_k_diffusion():
    code = "import sys, kdpp.checkpoints.pipelines as p; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"diffusers", "transformers", "k_diffusion", "peft"} & set(run.stdout.split())


# UNets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_unets_denoiser_is_its_formula(prediction):
    """``D(x_σ) = x0`` of what the UNet says of ``x_σ/sqrt(1+σ²)`` at the timestep of σ."""
    unet, scheduler = tiny.unet(), tiny.euler(prediction_type=prediction)
    denoiser = as_denoiser(unet, scheduler)
    for t in (0, 333, 999):
        bar = scheduler.alphas_cumprod[t]
        sigma = ((1 - bar) / bar).sqrt()
        vp = X / (1 + sigma**2).sqrt()
        said = unet(vp, t, TEXT).sample
        wanted = {
            "epsilon": X - sigma * said,
            "v_prediction": bar.sqrt() * vp - (1 - bar).sqrt() * said,
            "sample": said,
        }[prediction]
        found = denoiser(X, sigma.expand(2), cond=COND)
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(denoiser(X, sigma.expand(2), cond=TEXT), found)
    assert denoiser.sigma_max == sigma


@needs.k_diffusion
@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
def test_k_diffusion_wraps_the_compvis_form(prediction):
    """Its CompVisDenoiser and CompVisVDenoiser give `as_denoiser`'s answers bit for bit."""
    from k_diffusion import external

    unet, scheduler = tiny.unet(), tiny.euler(prediction_type=prediction)
    model = CompVisModel(unet, scheduler)
    v = model.parameterization == "v"
    assert v == (prediction == "v_prediction")
    sigma = torch.tensor([0.5, 7.0])
    wanted = as_denoiser(unet, scheduler)(X, sigma, cond=COND)
    wrap = external.CompVisVDenoiser if v else external.CompVisDenoiser
    assert torch.equal(wrap(model)(X, sigma, cond=COND), wanted)
    ours = getattr(kdpp.kdiffusion.external, wrap.__name__)
    assert torch.equal(ours(model)(X, sigma, cond=TEXT), wanted)
    with pytest.raises(TypeError, match=f"seems to predict {'v' if v else 'noise'} at a timestep"):
        kdpp.TeacherGuidedDenoiser(model, model)


def test_an_unwrapped_x0_unet_has_no_compvis_form():
    with pytest.raises(ValueError, match="predicts x0 has no CompVis form"):
        CompVisModel(tiny.unet(), tiny.euler(prediction_type="sample"))
    with pytest.raises(TypeError, match="is a flow model, which has no alphas_cumprod"):
        CompVisModel(tiny.sd3().transformer, tiny.euler())


def test_a_table_of_its_own_and_a_prediction():
    """A tensor of ᾱ with the prediction said is the scheduler that has both."""
    unet, scheduler = tiny.unet(), tiny.euler(prediction_type="v_prediction")
    wanted = as_denoiser(unet, scheduler)(X, torch.ones(2), cond=COND)
    table = scheduler.alphas_cumprod
    found = as_denoiser(unet, table, prediction="v_prediction")
    assert torch.equal(found(X, torch.ones(2), cond=COND), wanted)
    other = as_denoiser(unet, scheduler, prediction="epsilon")(X, torch.ones(2), cond=COND)
    assert not torch.equal(other, wanted)


def test_zero_terminal_snr_is_a_level_of_4096():
    """A table that ends at 0 gives no infinity, whichever scheduler has it."""
    scheduler = diffusers.DDIMScheduler(
        **tiny.TABLE, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    assert scheduler.alphas_cumprod[-1] == 0
    denoiser = as_denoiser(tiny.unet(), scheduler)
    assert denoiser.sigma_max.item() == pytest.approx(4096, rel=1e-6)
    sigmas = trailing_sigmas(denoiser, 2)
    assert sigmas.isfinite().all() and sigmas[0].item() == pytest.approx(4096, rel=1e-6)
    assert denoiser(sigmas[0] * X, sigmas[0].expand(2), cond=COND).isfinite().all()
    assert scheduler.alphas_cumprod[-1] == 0  # the scheduler is as it was
    scheduler.config.timestep_spacing = "trailing"
    torch.testing.assert_close(scheduler_sigmas(scheduler, 2)[0], sigmas[0])


@pytest.mark.parametrize("size", [8, 9])
def test_the_embedding_of_w_is_diffusers(size):
    """To the rounding of sines of 7,000 radians; float16 is not enough for these."""
    w = torch.tensor([0.0, 1.5, 7.0])
    theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    found = networks.guidance_embedding(w, size)
    torch.testing.assert_close(found, theirs(None, w, size), rtol=0, atol=1e-3)
    assert torch.equal(networks.guidance_embedding(w.half(), size), found)


def test_a_unet_that_takes_w_and_a_consistency_model():
    """The LCM scheduler, or ``lcm``, makes it an LCM; its config makes w an input."""
    unet, table = tiny.unet(time_cond_proj_dim=8), diffusers.LCMScheduler(**tiny.TABLE)
    denoiser = as_denoiser(unet, table)
    assert isinstance(denoiser, kdpp.GuidanceConditioned)
    assert isinstance(denoiser.model, kdpp.LCMDenoiser)
    sigma = torch.full((2,), 0.03)  # where the boundary's scalings are felt
    plain = as_denoiser(unet, table, lcm=False)
    said = {"cond": COND, "cond_scale": 5.0}
    assert not torch.equal(denoiser(X, sigma, **said), plain(X, sigma, **said))
    same = as_denoiser(unet, tiny.euler(), lcm=True)
    assert torch.equal(same(X, sigma, **said), denoiser(X, sigma, **said))
    with pytest.raises(ValueError, match="takes its guidance as an input"):
        denoiser(X, sigma, cond=COND)


# Any network --------------------------------------------------------------------------------------


def transformers():
    """Every transformer, with a latent and its conditions."""
    text = {"encoder_hidden_states": TEXT}
    wide = {"encoder_hidden_states": drawn(2, 5, 32), "pooled_projections": drawn(2, 32)}
    pooled = {**text, "pooled_projections": drawn(2, 16)}
    return {
        "sd3": (tiny.sd3().transformer, X, wide),
        "flux": (tiny.flux().transformer, X, pooled),
        "z_image": (tiny.z_image().transformer, X, text),
        "qwen_image": (tiny.qwen_image().transformer, X, text),
        "wan": (tiny.wan().transformer, drawn(2, 4, 2, 4, 6), text),
    }


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image", "qwen_image", "wan"])
def test_a_transformer_in_16_bits_takes_float32_latents(name):
    """Called in its own dtype, it answers in x's, near what it says in float32; at every τ."""
    network, x, cond = transformers()[name]
    for level in (1.0, 0.5, 0.0):
        tau = torch.full((2,), level)
        wanted = as_denoiser(network.float())(x, tau, cond=cond)
        assert wanted.isfinite().all() and (level > 0.0 or torch.equal(wanted, x))
        small = {key: value.bfloat16() for key, value in cond.items()}
        found = as_denoiser(network.bfloat16())(x, tau, cond=small)
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_a_unet_in_16_bits_answers_in_float32():
    unet = tiny.unet().bfloat16()
    model = CompVisModel(unet, tiny.euler())
    found = model.apply_model(X, torch.tensor([5.0, 900.0]), TEXT.bfloat16())
    assert found.dtype == torch.float32
    wanted = unet(X.bfloat16(), torch.tensor([5.0, 900.0]), TEXT.bfloat16()).sample
    assert torch.equal(found, wanted.float())


def test_a_compiled_network_is_recognised():
    """torch.compile's module stands for the one inside it."""
    unet = tiny.unet()
    compiled = torch.compile(unet, backend="eager")
    wanted = as_denoiser(unet, tiny.euler())(X, torch.ones(2), cond=COND)
    found = as_denoiser(compiled, tiny.euler())(X, torch.ones(2), cond=COND)
    torch.testing.assert_close(found, wanted)


def test_packing_is_undone():
    x = drawn(2, 4, 8, 12)
    tokens = networks.packed(x)
    assert tokens.shape == (2, 24, 16)
    assert torch.equal(networks.unpacked(tokens, 4, 6), x)
    assert torch.equal(tokens[0, 0, :4], x[0, 0, :2, :2].flatten())


def test_experts_share_the_levels():
    """From the boundary up the first, below it the second, row by row."""

    def expert(answer):
        return kdpp.FlowDenoiser(lambda x, t, cond: (x - answer * cond) / t[:, None])

    both = Experts(expert(1.0), expert(2.0), 0.5)
    assert both.flow
    x, cond = drawn(3, 4), torch.tensor([[1.0], [10.0], [100.0]])
    found = both(x, torch.tensor([0.9, 0.2, 0.5]), cond=cond)
    torch.testing.assert_close(found, torch.tensor([[1.0], [20.0], [100.0]]).expand(3, 4))
    assert both(x[:1], torch.tensor([0.9]), cond=cond[:1]).mean().item() == pytest.approx(1)
    assert both(x[:1], torch.tensor([0.2]), cond=cond[:1]).mean().item() == pytest.approx(2)
    with pytest.raises(ValueError, match="two flow models or two VE denoisers"):
        Experts(expert(1.0), lambda x, sigma: x, 0.5)
    with pytest.raises(ValueError, match="boundary is nan"):
        Experts(expert(1.0), expert(1.0), float("nan"))


def test_cfg_that_keeps_the_norm():
    """Patch by patch the guided velocity is as long as the conditional one, and as CFG's points."""
    rows = []
    plain = kdpp.FlowDenoiser(lambda x, t, cond: rows.append(len(x)) or x * cond)
    keeping, tau = NormKeepingCFG(plain), torch.full((2,), 0.5)
    cond, uncond = drawn(2, 4, 8, 12, seed=2), drawn(2, 4, 8, 12, seed=3)
    found = (X - keeping(X, tau, cond=cond, uncond=uncond, cond_scale=4.0)) / 0.5
    guided = X * (uncond + 4.0 * (cond - uncond))
    norm = networks.packed(found).norm(dim=2)
    torch.testing.assert_close(norm, networks.packed(X * cond).norm(dim=2))
    cosine = torch.cosine_similarity(networks.packed(found), networks.packed(guided), dim=2)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert torch.equal(keeping(X, tau, cond=cond, uncond=uncond), plain(X, tau, cond=cond))
    told = {"cond": cond, "uncond": uncond, "cond_scale": 4.0}
    model = kdpp.TeacherGuidedDenoiser(keeping, keeping, teacher_scale=0.0, max_batch=1)
    rows.clear()
    split = kdpp.sample_euler_tg(model, X, torch.tensor([0.5, 0.0]), told, disable=True)
    assert rows == [2, 2]  # one sample at a time, with both its halves
    torch.testing.assert_close(split, keeping(X, tau, **told))
    zero = keeping(X, torch.zeros(2), cond=cond, uncond=uncond, cond_scale=4.0)
    assert torch.equal(zero, X)


# Levels -------------------------------------------------------------------------------------------


def timesteps(sigmas):
    """The timesteps of levels, of Stable Diffusion's table."""
    table = as_denoiser(tiny.unet(), tiny.euler())
    assert sigmas[-1] == 0
    return table.sigma_to_t(sigmas[:-1]).round().tolist()


def test_trailing_levels():
    """Those of diffusers' schedulers, and the numbers that SDXL-Lightning's authors give."""
    denoiser = as_denoiser(tiny.unet(), tiny.euler())
    assert timesteps(trailing_sigmas(denoiser, 4)) == [999, 749, 499, 249]
    for steps in (1, 2, 3, 7, 8):
        scheduler = tiny.euler()
        scheduler.set_timesteps(steps)
        assert timesteps(trailing_sigmas(denoiser, steps)) == scheduler.timesteps.tolist()
        torch.testing.assert_close(trailing_sigmas(denoiser, steps), scheduler.sigmas)


def test_flow_levels():
    torch.testing.assert_close(flow_sigmas(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    torch.testing.assert_close(flow_sigmas(2), torch.tensor([1, 0.5, 0]))
    scheduler = tiny.flow(shift=5.0)
    even = scheduler_sigmas(scheduler, 7, even=True)
    torch.testing.assert_close(flow_sigmas(7, 5.0), even)
    for shift in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="shift is"):
            flow_sigmas(4, shift)


def test_levels_of_schedulers():
    """Each as its pipeline uses it; the scheduler that is asked stays as it was."""
    lcm = diffusers.LCMScheduler(**tiny.TABLE)
    before = lcm.timesteps.clone()
    assert timesteps(scheduler_sigmas(lcm, 4)) == [999, 759, 499, 259]
    assert torch.equal(lcm.timesteps, before)
    pndm = diffusers.PNDMScheduler(**tiny.TABLE, skip_prk_steps=True)  # asks one timestep twice
    assert timesteps(scheduler_sigmas(pndm, 4)) == [751, 501, 251, 1]
    ddim = diffusers.DDIMScheduler(**tiny.TABLE, timestep_spacing="trailing")
    assert timesteps(scheduler_sigmas(ddim, 4)) == [999, 749, 499, 249]
    karras = tiny.euler(use_karras_sigmas=True)
    karras.set_timesteps(5)
    assert torch.equal(scheduler_sigmas(karras, 5), karras.sigmas)
    # SD3's: shifted twice, and the last step goes to waste.
    twice = scheduler_sigmas(tiny.flow(shift=3.0), 4)
    torch.testing.assert_close(twice, torch.tensor([1, 0.858, 0.602, 0.009, 0]), rtol=0, atol=5e-4)


def test_levels_that_depend_on_the_resolution():
    """mu runs from 0.5 at 256 patches to 1.15 at 4096; shift is exp(mu)."""
    scheduler = tiny.flow(use_dynamic_shifting=True)
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        found = scheduler_sigmas(scheduler, 4, tokens=tokens, even=True)
        shift = torch.tensor(mu).exp().item()
        torch.testing.assert_close(found, flow_sigmas(4, shift), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="shift depends on the resolution: give tokens"):
        scheduler_sigmas(scheduler, 4)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_scheduler_without_finite_levels():
    """One step and a stretch to the terminal level: diffusers divides by zero."""
    scheduler = tiny.flow(shift_terminal=0.02)
    with pytest.raises(ValueError, match="has no finite levels for steps=1"):
        scheduler_sigmas(scheduler, 1, even=True)


# Refusals -----------------------------------------------------------------------------------------


def test_what_is_not_a_known_network():
    with pytest.raises(TypeError, match=r"^AutoencoderKL is not a network that .*WanTransformer3D"):
        as_denoiser(tiny.vae())
    with pytest.raises(TypeError, match=r"of a pipeline, that is pipe\.unet or pipe\.transformer"):
        as_denoiser(tiny.sd())


def test_a_network_that_takes_more_than_the_latent():
    with pytest.raises(TypeError, match="takes 9 channels and answers 4: it wants a picture or a"):
        as_denoiser(tiny.unet(in_channels=9), tiny.euler())


def test_a_schedule_that_does_not_fit():
    unet, flow = tiny.unet(), tiny.sd3().transformer
    table = tiny.euler().alphas_cumprod
    with pytest.raises(ValueError, match=r"is None; it must be one of epsilon, v_prediction"):
        as_denoiser(unet, table)
    with pytest.raises(TypeError, match=r"needs its levels: .*NoneType has no alphas_cumprod"):
        as_denoiser(unet, prediction="epsilon")
    for wrong in (table.flip(0), table[None], table[:1], table * 2, table - 0.5, table * torch.nan):
        with pytest.raises(ValueError, match="alphas_cumprod has shape"):
            as_denoiser(unet, wrong, prediction="epsilon")
    for settings in ({"lcm": True}, {"prediction": "epsilon"}):
        with pytest.raises(ValueError, match="is a flow model: it predicts the velocity"):
            as_denoiser(flow, **settings)
    for wrong in (tiny.euler(), table):
        with pytest.raises(ValueError, match="is a flow model: it predicts the velocity"):
            as_denoiser(flow, wrong)
    flows = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    for right in (None, tiny.flow(), flows):
        assert as_denoiser(flow, right).flow


def test_conditions_that_a_network_cannot_take():
    denoiser = as_denoiser(tiny.unet(), tiny.euler())
    for wrong in (None, [TEXT], {"text": TEXT}):
        with pytest.raises(TypeError, match="takes a dict of its arguments, with encoder_hidden"):
            denoiser(X, torch.ones(2), cond=wrong)
    flux, _, cond = transformers()["flux"]
    with pytest.raises(ValueError, match=r"latent has shape .* an even height and width"):
        as_denoiser(flux)(X[..., :-1], torch.ones(2), cond=cond)


def test_the_networks_dtype_is_looked_up_once(monkeypatch):
    """diffusers walks over every module for it; another dtype of the weights is seen."""
    unet, walks = tiny.unet(), []
    kind, dtype = type(unet), type(unet).dtype
    monkeypatch.setattr(kind, "dtype", property(lambda self: walks.append(1) or dtype.fget(self)))
    denoiser = as_denoiser(unet, tiny.euler())
    for _ in range(3):
        denoiser(X, torch.tensor([1.0, 2.0]), cond=TEXT)
    assert len(walks) == 1
    unet.bfloat16()
    denoiser(X, torch.tensor([1.0, 2.0]), cond=TEXT.bfloat16())
    assert len(walks) == 2
