"""Samplers by name: any of them can take the place of a model's own scheduler.

A sampler keeps the model's schedule (betas or flow shift, prediction type, spacing): the diffusers class is built by
`from_config` of the model's scheduler. Imports diffusers only when one is built.
"""

from __future__ import annotations

from typing import Any

from genkit.errors import unknown

# Name: diffusers class, and what is set beyond the model's configuration.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++-single": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
# The same names for flow-matching models.
FLOW_SAMPLERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "lcm": "FlowMatchLCMScheduler",
}


def require(name: str) -> None:
    """Check a sampler's name.

    Raises:
        ValueError: unknown; the message names the closest.
    """
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)


def build(name: str, scheduler: Any) -> Any:
    """A fresh diffusers scheduler with the configuration of the model's own.

    Args:
        scheduler: the model's own.

    Raises:
        ValueError: unknown, or it does not fit the model's kind (flow matching, EDM).
    """
    import diffusers

    from genkit import _host

    require(name)
    if _host.is_preconditioned(scheduler):
        raise ValueError(f"Sampler {name!r} does not fit this EDM model. Leave --sampler out to use the model's own.")
    if _host.is_flow(scheduler):
        if name not in FLOW_SAMPLERS:
            raise ValueError(f"Sampler {name!r} does not fit this flow-matching model. Use one of: {', '.join(FLOW_SAMPLERS)}.")
        return getattr(diffusers, FLOW_SAMPLERS[name]).from_config(scheduler.config)
    class_name, settings = SAMPLERS[name]
    # A scheduler that never clips (PNDM, DPM++, ...) does not mention it, but DDIM and DDPM clip by default.
    clip = {} if "clip_sample" in scheduler.config else {"clip_sample": False}
    return getattr(diffusers, class_name).from_config(scheduler.config, **clip, **settings)
