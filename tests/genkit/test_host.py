"""A version test for each private touch point of diffusers: what fails here has moved in diffusers, and `_host.py` must follow."""

from __future__ import annotations

import accelerate
import diffusers
import pytest
import torch

from genkit import _host
from tests import tiny
from tests.schedulers import scheduler_class

VERSION = f"diffusers {diffusers.__version__}"
ALPHA_SIGMA = [
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
]
ABAR = ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler", "UnCLIPScheduler"]
SIGMA_SPACE = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"]
SECOND_ORDER = ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"]
FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"]
EDM = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"]
EVERY = ALPHA_SIGMA + ABAR + SIGMA_SPACE + SECOND_ORDER + FLOW + EDM


def ready(name: str, n: int = 5, **config):
    scheduler = scheduler_class(name)(**config)
    scheduler.set_timesteps(n)
    return scheduler


@pytest.mark.parametrize("name", EVERY)
def test_families_are_told_apart(name):
    scheduler = ready(name)
    found = (_host.is_flow(scheduler), _host.is_preconditioned(scheduler), _host.is_second_order(scheduler))
    assert found == (name in FLOW, name in EDM, name in [*SECOND_ORDER, "FlowMatchHeunDiscreteScheduler"]), f"{name} in {VERSION}"
    assert (_host.evaluation_sigmas(scheduler) is None) == (name in ABAR), f"{name}.sigmas in {VERSION}"
    if name not in FLOW + EDM:
        assert isinstance(_host.alphas_cumprod(scheduler), torch.Tensor), f"{name}.alphas_cumprod in {VERSION}"


@pytest.mark.parametrize("name", EVERY)
def test_number_of_steps(name):
    """`is_ready` reads `num_inference_steps`, None or absent before `set_timesteps`, which a few call in their __init__."""
    fresh = scheduler_class(name)()
    expected = name in [*SECOND_ORDER, "LMSDiscreteScheduler"]
    assert _host.is_ready(fresh) == expected, f"{name}.num_inference_steps in {VERSION}"
    assert _host.is_ready(ready(name))


def test_custom_timesteps_of_ddpm():
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(timesteps=[10, 5, 0])
    assert scheduler.num_inference_steps is None, f"{VERSION} counts them now: `is_ready` can be simpler"
    assert _host.is_ready(scheduler)


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "UnCLIPScheduler"}))
def test_begin(name):
    scheduler = ready(name)
    _host.begin(scheduler)
    assert scheduler.begin_index == 0, f"{name}.set_begin_index in {VERSION}"
    scheduler._init_step_index(scheduler.timesteps[2])
    assert scheduler.step_index == 0, f"{name}._init_step_index in {VERSION}"


@pytest.mark.parametrize("name", [*SIGMA_SPACE, "EDMEulerScheduler"])
def test_scaled_input_flag(name):
    scheduler = ready(name)
    assert scheduler.is_scale_input_called is False, f"{name}.is_scale_input_called in {VERSION}"
    _host.begin(scheduler)
    assert scheduler.is_scale_input_called is True


@pytest.mark.parametrize("name", ALPHA_SIGMA)
def test_sigma_to_alpha_sigma(name):
    """Takes a tensor, keeps float64, and knows both schedules."""
    alpha, sigma = _host.alpha_sigma(ready(name), 2.0)
    assert (alpha, sigma) == pytest.approx((5**-0.5, 2 * 5**-0.5), rel=1e-15), f"{name}._sigma_to_alpha_sigma_t in {VERSION}"
    assert _host.alpha_sigma(ready(name, use_flow_sigmas=True, prediction_type="flow_prediction"), 0.25) == (0.75, 0.25)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order_state(name):
    """`state_in_first_order` is a property of the class, true first and false after one step."""
    scheduler = ready(name)
    scheduler.noise_sampler = lambda *_: torch.zeros(1)
    x = torch.ones(1, 1)
    for i, order in enumerate(_host.evaluation_orders(scheduler)[:-1]):
        assert scheduler.state_in_first_order == (order == 1), f"{name}.state_in_first_order in {VERSION}"
        x = scheduler.step(torch.zeros_like(x), scheduler.timesteps[i], x).prev_sample


@pytest.mark.parametrize(("name", "shift"), [("KDPM2DiscreteScheduler", 0), ("KDPM2AncestralDiscreteScheduler", 1)])
def test_interpolated_sigmas(name, shift):
    """`sigmas_interpol[i - shift]` lies between the sigmas of evaluations i - 1 and i + 1."""
    scheduler = ready(name, 8)
    sigmas = _host.evaluation_sigmas(scheduler)
    for i in range(1, len(sigmas), 2):
        assert sigmas[i] == scheduler.sigmas_interpol[i - shift], f"{name}.sigmas_interpol in {VERSION}"
        assert sigmas[i] < sigmas[i - 1]


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_precondition_outputs(name):
    """Affine in sample and output, takes a number or a tensor that broadcasts, and keeps float64."""
    scheduler = ready(name)
    x, raw = torch.randn(2, 2, 3, dtype=torch.float64).unbind()
    sigma, data = 2.0, scheduler.config.sigma_data
    expected = data**2 / (sigma**2 + data**2) * x + sigma * data / (sigma**2 + data**2) ** 0.5 * raw
    for value in (sigma, torch.full((2, 1), sigma, dtype=torch.float64)):
        denoised = scheduler.precondition_outputs(x, raw, value)
        torch.testing.assert_close(denoised, expected, msg=f"{name}.precondition_outputs in {VERSION}")
        torch.testing.assert_close(scheduler.precondition_inputs(x, value), x / (sigma**2 + data**2) ** 0.5)


def test_who_takes_a_learned_variance():
    for name, takes in (("DDPMScheduler", True), ("UnCLIPScheduler", True), ("DPMSolverMultistepScheduler", False)):
        scheduler = ready(name, variance_type="learned_range")
        assert _host.takes_variance(scheduler) == takes, f"{name}._get_variance in {VERSION}"
    assert not _host.takes_variance(ready("DDPMScheduler"))
    assert not _host.takes_variance(ready("DDIMScheduler"))


def test_refused_families():
    for name in ("CMStochasticIterativeScheduler", "IPNDMScheduler"):
        scheduler = ready(name)
        assert _host.evaluation_sigmas(scheduler) is None
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            _host.alphas_cumprod(scheduler)


def unconditional() -> diffusers.DDPMPipeline:
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]
    )
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())


def test_accelerate_offload_is_seen():
    """`_hf_hook` of accelerate on each component, and `_all_hooks` of `enable_model_cpu_offload`, gone when it is taken back."""
    pipe = unconditional()
    assert not _host.is_offloaded(pipe)
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert _host.is_offloaded(pipe), f"_hf_hook in accelerate {accelerate.__version__}"
    pipe.remove_all_hooks()
    assert not _host.is_offloaded(pipe)
    pipe._all_hooks.append(object())
    assert _host.is_offloaded(pipe)


@pytest.mark.parametrize("arguments", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}])
def test_group_offload_is_seen(arguments):
    pipe = unconditional()
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), **arguments)
    assert _host.is_offloaded(pipe), f"`_diffusers_hook` or its name 'group_offloading' in {VERSION}"


@pytest.mark.parametrize(
    ("name", "config", "first"),
    [
        ("DDIMScheduler", {}, [0, 1, 2, 3, 4, 5]),
        ("HeunDiscreteScheduler", {}, [0, 2, 4, 6, 8, 10]),
        ("DPMSolverSinglestepScheduler", {}, [0, 2, 4, 5]),
        ("PNDMScheduler", {"skip_prk_steps": True}, [0, 2, 3, 4, 5, 6]),
        ("PNDMScheduler", {"skip_prk_steps": False}, [0, 4, 8, 12, 13, 14]),
    ],
)
def test_which_entries_start_a_step(name, config, first):
    scheduler = ready(name, 6, **config)
    starts = [i for i in range(len(scheduler.timesteps)) if _host.starts_step(scheduler, i)]
    assert starts == first, f"order_list, prk_timesteps or state_in_first_order of {name} in {VERSION}"


def test_where_the_last_step_ends():
    assert _host.final_alpha_sigma(ready("EulerDiscreteScheduler")) == (1.0, 0.0)
    assert _host.final_alpha_sigma(ready("FlowMatchEulerDiscreteScheduler")) == (1.0, 0.0)
    assert _host.final_alpha_sigma(ready("DDPMScheduler")) == (1.0, 0.0)
    scheduler = ready("DDIMScheduler", set_alpha_to_one=False)
    assert _host.final_alpha_sigma(scheduler)[0] == pytest.approx(scheduler.alphas_cumprod[0].sqrt().item())
    scheduler = ready("DPMSolverMultistepScheduler", final_sigmas_type="sigma_min")
    assert _host.final_alpha_sigma(scheduler)[1] == pytest.approx((1 - scheduler.alphas_cumprod[0]).sqrt().item(), rel=1e-4)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"]
)
def test_a_multistep_scheduler_forgets(name):
    """After it, a step is that of a fresh scheduler which starts there."""
    config = {"final_sigmas_type": "zero"} if name == "DPMSolverMultistepScheduler" else {}
    used, fresh = ready(name, **config), ready(name, **config)
    _host.begin(used)
    g = torch.Generator().manual_seed(0)
    x, outputs = torch.randn(2, 4, generator=g), torch.randn(4, 2, 4, generator=g)
    noise = {"generator": torch.Generator().manual_seed(1)} if name == "SASolverScheduler" else {}
    for i in range(3):
        used.step(outputs[i], used.timesteps[i], x, **noise)
    _host.forget_history(used)
    fresh.set_begin_index(3)
    results = []
    for scheduler in (used, fresh):
        noise = {"generator": torch.Generator().manual_seed(1)} if name == "SASolverScheduler" else {}
        results.append(scheduler.step(outputs[3], scheduler.timesteps[3], x, **noise).prev_sample)
    torch.testing.assert_close(*results, msg=f"lower_order_nums or last_sample of {name} in {VERSION}")


def test_cross_attentions():
    """Keys and values are `to_k(text)` and `to_v(text)`, and the processors are those that are known."""
    unet = tiny.pipeline("stable_diffusion").unet
    found = _host.cross_attentions(unet)
    assert [a for name, a in unet.named_modules() if name.endswith("attn2")] == found, f"is_cross_attention in {VERSION}"
    seen = []
    for name in ("to_k", "to_v"):
        getattr(found[0], name).register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output.shape[-1])))
    text = torch.randn(2, 5, 8)
    found[0](torch.randn(2, 3, unet.config.block_out_channels[0]), encoder_hidden_states=text)
    assert [(s is text, width) for s, width in seen] == [(True, found[0].inner_kv_dim)] * 2, f"inner_kv_dim in {VERSION}"
    assert all(hasattr(found[0], name) for name in ("norm_cross", "fused_projections", "group_norm", "spatial_norm", "add_k_proj"))
    unet.mid_block.compile()
    assert _host.cross_attentions(unet) == [], f"_compiled_call_impl in torch {torch.__version__}"


class TestAttentionDispatch:
    """diffusers' dispatcher: processors with `_attention_backend`, the registry, its requirements and its functions."""

    def test_the_backend_of_a_processor(self):
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        flux, unet = tiny.pipeline("flux").transformer, tiny.pipeline("stable_diffusion").unet
        (processor, *_), (other, *_) = ([m.processor for m in n.modules() if hasattr(m, "processor")] for n in (flux, unet))
        assert _host.attention_backend(other) is None, f"AttnProcessor2_0 of {VERSION} is on the dispatcher"
        default = _AttentionBackendRegistry.get_active_backend()[0]
        assert _host.attention_backend(processor) == default.value, f"_attention_backend in {VERSION}"
        processor._attention_backend = AttentionBackendName.FLEX
        assert _host.attention_backend(processor) == "flex"
        with _host.on_native_attention(flux):
            assert _host.attention_backend(processor) == "native"
        assert _host.attention_backend(processor) == "flex"
        processor._attention_backend = None
        try:
            flux.set_attention_backend("_native_math")
            assert _AttentionBackendRegistry.get_active_backend()[0] != default, (
                f"{VERSION} no longer changes the process's default"
            )
            assert _host.attention_backend(processor) == "_native_math"
        finally:
            _AttentionBackendRegistry.set_active_backend(default)

    def test_backends_of_the_hub(self):
        assert _host.hub_backend("flash") == _host.hub_backend("flash_hub") == "flash_hub", f"_HUB_KERNELS_REGISTRY of {VERSION}"
        assert _host.hub_backend("flash_3") == "_flash_3_hub"
        with pytest.raises(ValueError, match="Unknown Hub kernel 'flush'"):
            _host.hub_backend("flush")
        assert _host.why_backend_unusable("native") is None
        import importlib.util

        if importlib.util.find_spec("kernels") is None:
            assert "kernels" in (_host.why_backend_unusable("flash_hub") or ""), f"requirements of {VERSION}"

    def test_a_function_of_the_dispatcher_has_the_interface_of_sdpa(self):
        q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
        mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
        mask[1, ..., 4:] = False
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, mask, scale=0.3)
        found = _host.attention_function("native")(q, k, k, mask, scale=0.3)
        torch.testing.assert_close(found, expected, msg=f"dispatch_attention_fn of {VERSION}")
