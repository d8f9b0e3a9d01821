"""A Hamiltonian echo: the gradient of a lossless system by running it backwards (Lopez-Pastor & Marquardt 2023).

H(q, p) = |p|^2 / 2 + V(q), V = q^T K q / 2 + |q|_4^4 / 4, moves for a time T from (q_0, 0); the loss is |q(T) - goal|^2 / 2.
Its adjoint lambda obeys the variational equation of the motion itself once it is turned by Omega: a deviation y = Omega lambda
that starts at the end as y(T) = Omega grad l and is carried back along the motion. Time reversal carries it: flip the momenta,
push the state by +-eps y(T), let the same system run for T again. With q_+- on the way back at the same places,

    dl/dK = sum over time of h [ dV/dK(q_-) - dV/dK(q_+) ] / (2 eps) ,                         dV/dK = q q^T / 2 ,

a contrast of local quantities between two runs of the system, exact as eps -> 0, also for the leapfrog steps taken here. With
damping, dp/dt = -dV/dq - gamma p, the way back is not the way there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Seen = Callable[[Tensor, float], None]  # of a kick: where it happens and how long it lasts


@dataclass(frozen=True)
class Chain:
    """A chain of oscillators with couplings K (n, n), symmetric; damping gamma, and `steps` leapfrog steps of length `step`."""

    couplings: Tensor
    damping: float = 0.0
    step: float = 0.05
    steps: int = 100

    def run(self, q: Tensor, p: Tensor, seen: Seen = lambda at, kick: None) -> tuple[Tensor, Tensor]:
        """Where the motion from (q, p), (n,) each, ends."""
        half = self.step / 2
        kept = math.exp(-self.damping * half)  # of the momenta in each half step, so that -damping undoes it
        for _ in range(self.steps):
            seen(q, half)
            p = kept * p - half * self._slope(q)
            q = q + self.step * p
            seen(q, half)
            p = kept * (p - half * self._slope(q))
        return q, p

    def _slope(self, q: Tensor) -> Tensor:
        return self.couplings @ q + q**3


def backprop(chain: Chain, start: Tensor, goal: Tensor) -> Tensor:
    """dl/dK of symmetric couplings by automatic differentiation through the motion: (n, n)."""
    couplings = chain.couplings.clone().requires_grad_()
    end, _ = replace(chain, couplings=couplings).run(start, torch.zeros_like(start))
    found, = torch.autograd.grad((end - goal).square().sum() / 2, couplings)
    return (found + found.mT) / 2


@torch.no_grad()
def echo(chain: Chain, start: Tensor, goal: Tensor, eps: float = 1e-4) -> Tensor:
    """dl/dK by a run and two runs back, pushed by +-eps: (n, n). What damping takes on the way it takes on the way back too."""
    q, p = chain.run(start, torch.zeros_like(start))
    total = torch.zeros_like(chain.couplings)
    for sign in (1, -1):
        def seen(at: Tensor, kick: float, sign: int = sign) -> None:
            total.sub_(torch.outer(at, at), alpha=sign * kick / (4 * eps))

        # y(T) = Omega grad l moves the momenta alone, by -(q - goal); the flip turns their sign
        chain.run(q, -(p - sign * eps * (q - goal)), seen)
    return total
