"""Whether a router is locked: would anything change its choices?

That a positive temperature leaves the top-k choice as it is, is a tautology and proves nothing.
What can change are the choices under exploration noise, so a few tokens of each batch are probed:
how many of them get another set of experts when Gumbel noise of the current temperature is added
to their logits, and how far their last chosen expert stands above the best unchosen one.

Axes: M probed tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ecomoe.ecology.statistics import wide_dtype

NUM_PROBES = 64


def gumbel_noise(num_experts: int, *, num_probes: int = NUM_PROBES, seed: int = 0) -> Tensor:
    """Return standard Gumbel noise, ``(M, E)``, fp32 on the CPU.

    It is drawn once, from a generator of its own: a monitor must not move the global one.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform_ME = torch.rand(num_probes, num_experts, generator=generator, dtype=torch.float64)
    return -(-uniform_ME.clamp(1e-12, 1 - 1e-12).log()).log().float()


def probe_rows(num_tokens: int, *, device: torch.device, num_probes: int = NUM_PROBES) -> Tensor:
    """Return the indices of evenly spaced tokens, ``(M,)``; they repeat where there are fewer."""
    return torch.arange(num_probes, device=device) * num_tokens // num_probes


def probe_counts(
    logits_ME: Tensor,
    *,
    top_k: int,
    temperature: Tensor | float,
    gumbel_ME: Tensor,
    valid_M: Tensor | None = None,
) -> dict[str, Tensor]:
    """Count the probed tokens, those whose set of experts flips under noise, and their margins.

    Args:
        logits_ME: Router scores.
        top_k: Experts per token; with all of them there is nothing to flip, and no probe counts.
        temperature: T, in the logits' unit.
        gumbel_ME: Standard Gumbel noise.
        valid_M: False for the tokens to leave out.

    Returns:
        ``probes``, ``flips`` and ``margin``, the sum over probes of (k-th minus next logit) / T.
    """
    num_experts = logits_ME.shape[-1]
    wide = wide_dtype(logits_ME.device)
    if top_k >= num_experts:
        zero = logits_ME.new_zeros((), dtype=wide)
        return {"probes": zero, "flips": zero, "margin": zero}
    scaled_ME = logits_ME.float() / temperature
    top_ME, ids_ME = scaled_ME.topk(top_k + 1, dim=-1)
    chosen_ME = torch.zeros_like(scaled_ME, dtype=torch.bool).scatter(1, ids_ME[:, :top_k], True)
    noisy_ME = scaled_ME + gumbel_ME
    lowest_M = noisy_ME.masked_fill(~chosen_ME, torch.inf).amin(-1)
    highest_M = noisy_ME.masked_fill(chosen_ME, -torch.inf).amax(-1)
    margin_M = top_ME[:, top_k - 1] - top_ME[:, top_k]
    counted_M = torch.isfinite(margin_M)
    if valid_M is not None:
        counted_M = counted_M & valid_M
    return {
        "probes": counted_M.to(wide).sum(),
        "flips": ((lowest_M < highest_M) & counted_M).to(wide).sum(),
        "margin": torch.where(counted_M, margin_M, 0.0).to(wide).sum(),
    }
