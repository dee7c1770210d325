"""Muon for the hidden matrices and AdamW for the rest, each one call for all parameters.

Muon (K. Jordan, https://kellerjordan.github.io/posts/muon/; scaled as in arXiv:2502.16982): the step is the nearest
(semi-)orthogonal matrix to the Nesterov momentum, found by five Newton-Schulz iterations; times 0.2 * sqrt(larger
side), so that its root mean square is AdamW's and both may use one learning rate. Matrices of one shape (or its
transpose) are stacked, so the iterations are a few batched products whatever the number of layers.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose iteration sends singular values into about 0.7..1.2


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The (semi-)orthogonal factors of [n, rows, columns], rows <= columns, with singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(matrices.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon:
    """Momentum, orthogonalised; `step(lr)` reads `.grad` of every parameter."""

    def __init__(self, parameters: list[Tensor], *, momentum: float, weight_decay: float, dtype=torch.bfloat16):
        self.momentum, self.weight_decay, self.dtype = momentum, weight_decay, dtype
        self.groups: dict[tuple[int, int], list[Tensor]] = defaultdict(list)  # (smaller, larger side) -> matrices
        for parameter in parameters:
            self.groups[(min(parameter.shape), max(parameter.shape))].append(parameter)
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }
        self.orthogonalise = orthogonalise

    def compile(self) -> None:
        self.orthogonalise = torch.compile(orthogonalise, dynamic=False)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, group in self.groups.items():
            tall = [p.shape[0] > p.shape[1] for p in group]
            gradients = torch.stack([p.grad.mT if t else p.grad for p, t in zip(group, tall)])
            buffer = self.buffers[shape]
            buffer.lerp_(gradients, 1 - self.momentum)
            nesterov = gradients.lerp_(buffer, self.momentum)
            updates = self.orthogonalise(nesterov.to(self.dtype)).float()
            updates = [u.mT if t else u for u, t in zip(updates.unbind(0), tall)]
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, updates, alpha=-lr * 0.2 * shape[1] ** 0.5)

    def state_dict(self) -> dict:
        return {"buffers": {f"{rows}x{columns}": buffer for (rows, columns), buffer in self.buffers.items()}}

    def load_state_dict(self, state: dict) -> None:
        for (rows, columns), buffer in self.buffers.items():
            buffer.copy_(state["buffers"][f"{rows}x{columns}"])


class Optimisers:
    """Muon on 2-D hidden matrices, AdamW on embeddings and norms, one gradient clip before both."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        muon_lr: float,
        adamw_lr: float,
        momentum: float = 0.95,
        muon_weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        clip: float = 1.0,
        muon_dtype: torch.dtype = torch.bfloat16,
    ):
        self.muon_lr, self.adamw_lr, self.clip = muon_lr, adamw_lr, clip
        self.parameters = list(model.parameters())
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self.muon = Muon(matrices, momentum=momentum, weight_decay=muon_weight_decay, dtype=muon_dtype)
        on_gpu = rest[0].device.type == "cuda"
        self.adamw = torch.optim.AdamW(rest, lr=adamw_lr, betas=tuple(betas), eps=1e-10, weight_decay=0, fused=on_gpu)

    @torch.no_grad()
    def step(self, scale: float) -> Tensor:
        """One update with both learning rates times `scale`; returns the gradient norm (on the device, no sync)."""
        gradients = [p.grad for p in self.parameters]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (self.clip / (norm + 1e-6)).clamp_max(1.0))
        self.muon.step(self.muon_lr * scale)
        for group in self.adamw.param_groups:
            group["lr"] = self.adamw_lr * scale
        self.adamw.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
