"""How alike experts are: what each of them makes of the same tokens.

Once an evaluation a few tokens go through all experts of a layer, and the likeness of the outputs
is summed up at once, so that no output is kept. Two measures, each a mean over pairs of experts:

- the cosine of two experts' outputs for a token: 1 where one could stand in for the other but for
  scale, 0 where they have nothing in common;
- linear CKA (Kornblith et al. 2019) with the unbiased estimate of HSIC (Song et al. 2012): whether
  two experts tell tokens apart in the same way, whatever the axes of their outputs. Unlike the
  usual form it is 0 on average for unrelated outputs, however few the tokens.

Upcycled experts begin at 1 in both.

Axes: M probed tokens, E experts, F output features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ecomoe.ecology.statistics import wide_dtype

NUM_PROBES = 32
# The form without bias divides by (n - 2) and (n - 3).
MIN_PROBES = 4


def similarity_counts(outputs_MEF: Tensor, *, valid_M: Tensor) -> dict[str, Tensor]:
    """Sum up how alike the outputs of E experts are, on their device.

    Args:
        outputs_MEF: Every expert's output on every probed token.
        valid_M: False for the tokens to leave out, as those with an output that is not finite are.

    Returns:
        ``compared`` tokens, with the sum of their mean ``cosine``; ``aligned``, 1 where there were
        enough tokens for the mean ``cka`` beside it; for each expert the one most like it,
        ``nearest``, and the sum of their ``nearest_cosine``. All 0 for a single expert, which has
        no nearest one.
    """
    wide = wide_dtype(outputs_MEF.device)
    num_experts = outputs_MEF.shape[1]
    if num_experts < 2:
        zero = outputs_MEF.new_zeros((), dtype=wide)
        return dict.fromkeys(("compared", "cosine", "aligned", "cka"), zero)
    valid_M = valid_M & torch.isfinite(outputs_MEF).all(-1).all(-1)
    outputs_MEF = torch.where(valid_M[:, None, None], outputs_MEF, 0).float()
    units_MEF = F.normalize(outputs_MEF, dim=-1)
    cosine_M = _mean_of_pairs(units_MEF)
    cka, enough = _debiased_cka(outputs_MEF, valid_M.float())
    alike_EE = torch.einsum("mef,mgf->eg", units_MEF, units_MEF)
    own_EE = torch.eye(num_experts, dtype=torch.bool, device=alike_EE.device)
    highest_E, nearest_E = alike_EE.masked_fill(own_EE, -torch.inf).max(1)
    return {
        "compared": valid_M.to(wide).sum(),
        "cosine": cosine_M.to(wide).sum(),
        "aligned": enough.to(wide),
        "cka": torch.where(enough, cka, 0).to(wide),
        "nearest": nearest_E,
        "nearest_cosine": highest_E,
    }


def _mean_of_pairs(units: Tensor) -> Tensor:
    """Return the mean product of two different vectors of ``(..., E, F)``, ``(...)``."""
    num = units.shape[-2]
    all_pairs = units.sum(-2).square().sum(-1) - units.square().sum((-2, -1))
    return all_pairs / (num * (num - 1))


def _debiased_cka(outputs_MEF: Tensor, weights_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over pairs of experts, and whether there were tokens enough for it."""
    num = weights_M.sum()
    enough = num >= MIN_PROBES
    num = num.clamp_min(MIN_PROBES)
    # A common offset changes nothing in the end, but would cost digits on the way.
    centred_MEF = (outputs_MEF - outputs_MEF.sum(0) / num) * weights_M[:, None, None]
    diagonal_MM = torch.eye(weights_M.shape[0], device=weights_M.device)
    others_MM = weights_M[:, None] * weights_M * (1 - diagonal_MM)
    kernel_EMM = torch.einsum("mef,nef->emn", centred_MEF, centred_MEF) * others_MM
    sums_EM = kernel_EMM.sum(-1)
    total_E = sums_EM.sum(-1)
    kernel_EMM = kernel_EMM - (sums_EM[:, :, None] + sums_EM[:, None, :]) / (num - 2)
    kernel_EMM = kernel_EMM + total_E[:, None, None] / ((num - 1) * (num - 2))
    return _mean_of_pairs(F.normalize((kernel_EMM * others_MM).flatten(1), dim=-1)), enough
