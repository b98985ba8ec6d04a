"""AdamW at beta_1 = 0, the setting of adversarial training, without a first moment in memory.

    v <- beta_2 v + (1 - beta_2) g^2
    p <- p - lr (w p + g / (sqrt(v / (1 - beta_2^n)) + eps))              n updates so far, the first is 1

(Loshchilov & Hutter 2017, arXiv 1711.05101.) At beta_1 = 0 the first moment m <- beta_1 m + (1 - beta_1) g is the gradient. torch
keeps it all the same: 4 bytes for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

BETA_2 = 0.99  # of ADD's ancestor StyleGAN-T (Sauer et al. 2023, arXiv 2301.09515)


class MomentumFreeAdamW(torch.optim.Optimizer):
    """The updates of `torch.optim.AdamW(betas=(0, beta2), fused=True)`, to the bit, with half of its state.

    Args:
        parameters: floating-point.
        lr: learning rate.
        beta2: decay of the mean square of gradients.
        eps: added to its root.
        weight_decay: decoupled, w above.

    Example:
        >>> optimizer = MomentumFreeAdamW(student.parameters(), lr=1e-5)
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        beta2: float = BETA_2,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        # "fused" tells torch to put the counts of a loaded state where the parameters are.
        super().__init__(parameters, {"lr": lr, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients; a closure, if there is one, makes them first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients: list[Tensor] = [p.grad for p in parameters]
            states = [self._state(p) for p in parameters]
            # Each gradient is its own first moment: the kernel puts (1 - 0) g + 0 g into it.
            adamw(
                parameters, gradients, gradients, [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
                fused=True, amsgrad=False, beta1=0.0, beta2=group["beta2"], lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"], maximize=False,
            )  # fmt: skip
        return loss

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
