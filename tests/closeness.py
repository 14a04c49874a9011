"""How far a published program's float32 number may lie from ours, by one rule.

Two programs that compute the same formula differ by rounding alone. Ours runs in float64 wherever it
can: its own rounding, a billionth of theirs, plays no part then, and any processor gives the same
answer. What is left is the stored number's float32. A sum of n products in float32, in whatever
order, is off by at most n · u of the sum of their magnitudes, u = 2⁻²⁴ (Higham, Accuracy and
Stability of Numerical Algorithms, 3.1). So the bound is

    terms · u · scale,

`terms` the length of the longest chain of sums behind the number, `scale` the largest magnitude among
what was summed: the array's own, unless something large cancels on the way (a loss of distances has
the scale of the distances, a running mean that of the map). A wrong formula is off by a share of the
scale, and u is a seventeen-millionth of it: test_closeness.py plants a slip in each family of golden
numbers and sees it refused.
"""

import torch
from torch import Tensor

ROUNDING = 2.0**-24  # u of float32
SUMS = 64  # terms of the small vectors: 32 dimensions, a product and a square each
ROOT = 4096  # 1/√u: behind the root of a difference that should be 0, half the digits are left
DEEP = 256  # float32 on both sides, through the thirty layers of a network


def doubled(x) -> Tensor:
    "A stored array or number as float64."
    return torch.as_tensor(x).double()


def assert_same_formula(ours, theirs, terms, scale=None):
    "Our number and a stored float32 within the bound above."
    ours, theirs = (doubled(x.detach() if isinstance(x, Tensor) else x) for x in (ours, theirs))
    assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)}, stored {tuple(theirs.shape)}"
    assert ours.isfinite().all() and theirs.isfinite().all()
    scale = float(theirs.abs().max() if scale is None else scale)
    off = float((ours - theirs).abs().max())
    bound = terms * ROUNDING * scale
    assert off <= bound, f"off by {off:.2e}; {terms} · 2⁻²⁴ · {scale:.3g} = {bound:.2e} is allowed"
