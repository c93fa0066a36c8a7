"""How far a result may be from its reference, by dtype, and why.

Errors are relative to the largest magnitude in the reference: an element near 0 that is the sum of
large ones carries their rounding error.
"""

import torch
from torch import Tensor

RELATIVE = {
    # 2^-53 a rounding; sums of up to a few hundred terms, and exp and log between them.
    torch.float64: 1e-10,
    # 2^-24 a rounding: the same sums, two orders above one rounding.
    torch.float32: 1e-5,
    # Experts round to 11 bits after each of three products (the router stays in fp32): 2^-11 each,
    # and gradients pass the three again.
    torch.float16: 8 * 2**-11,
    # The same with 8 bits.
    torch.bfloat16: 8 * 2**-8,
}


def assert_near(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, *, name: str = "", scale: float = 1e-3
) -> None:
    """Compare with the tolerance of ``dtype``, the coarsest that took part.

    ``scale`` is the least magnitude to measure against, for a result that is a small difference of
    large numbers.
    """
    assert actual.shape == expected.shape, name
    if not actual.numel():
        return
    expected = expected.detach().to(torch.float64)
    error = (actual.detach().to(torch.float64) - expected).abs().max().item()
    bound = RELATIVE[dtype] * max(expected.abs().max().item(), scale)
    assert error <= bound, f"{name}: error {error:.3g} above {bound:.3g}"
