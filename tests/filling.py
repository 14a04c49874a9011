"""Weights and photos of the interchange's golden data: every number follows from a tensor's name, so a wrong name is another weight."""

import math
from zlib import crc32

import numpy as np
import torch
from test_golden_cdnet import MASK, fill, hashed, waves

BY_FILL = ("num_batches_tracked", "running_mean", "running_var", "bias", "weight")


def drawn(name, shape):
    "The numbers in 0 … 1 that belong to a name."
    i = np.arange(math.prod(shape), dtype=np.uint64)
    return hashed((i * 2654435761 + crc32(name.encode())) & MASK).reshape(shape)


def filled(name, shape):
    "A tensor by its name in a published file; rounded to float32, then float64."
    last, shape = name.rpartition(".")[2], tuple(shape)
    if last == "relative_position_index":  # computed, in files and in networks
        return torch.zeros(shape, dtype=torch.int64)
    if last in BY_FILL:
        found = fill(name, shape, torch.float64)
    elif last == "in_proj_weight":
        scale = math.sqrt(3 / math.prod(shape[1:]))
        found = torch.tensor((2 * drawn(name, shape) - 1) * scale)
    elif last == "p":
        found = torch.tensor(2.5 + drawn(name, shape))
    else:
        size = 0.1 if last == "in_proj_bias" else 0.2
        found = torch.tensor(size * (2 * drawn(name, shape) - 1))
    found = found * 0.1 if ".NL_" in name and last == "weight" and len(shape) > 1 else found
    return found.float().double() if found.is_floating_point() else found


def filled_state(rows):
    "A whole file, from lines of a name and the sizes of its shape."
    named = [row.split() for row in rows]
    return {name: filled(name, [int(n) for n in shape]) for name, *shape in named}


def photos(*shape):
    "The golden data's input, (B, 3, H, W): a slow wave and noise."
    return waves(shape, torch.float64) + torch.tensor(drawn("input", shape) - 0.5)
