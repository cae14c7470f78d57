"""Compares pictures that may show parts of each other: aligns them, and correlates their details.

The second picture is moved and stretched, in both directions apart, until its gray values explain those of the
first one best: least squares by Gauss-Newton (Lucas and Kanade 1981, "An Iterative Image Registration
Technique"), from coarse to fine, for all pairs at once. Two shirts on a white ground have much the same gray
values, and other details: what remains of a picture without its blurred copy decides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 64
"""Height and width of the pictures that are compared, in pixels."""
# Factor of coarseness, steps, and the correlation of gray values without which a pair is given up.
_STAGES = ((4, 8, 0.8), (2, 6, 0.8), (1, 4, 0.8))
_MOST = 0.3  # by which a picture may be moved or stretched, of half its width
_DETAIL = 5  # pixels that are averaged for the blurred copy
_FLAT = 1e-3  # standard deviation of gray values in [0, 1] below which nothing can be compared


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlate the details of pictures with those of others that are moved and stretched to match them.

    Args:
        first: Gray values, float32 (n, SIDE, SIDE) in [0, 1].
        second: Gray values of the other pictures, likewise.

    Returns:
        Correlation where the aligned pictures overlap, float32 (n,), at most 1. 0 for pictures that do not
        match coarsely, or if one of the two has only one color.
    """
    found = torch.zeros(len(first))
    left = torch.arange(len(first))
    # Each row: stretch and movement across, stretch and movement down.
    moved = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(len(first), 1)
    for factor, steps, least in _STAGES:
        one, other = (functional.avg_pool2d(gray[left, None], factor) for gray in (first, second))
        with_slopes = torch.cat([other, _slope(other, 3), _slope(other, 2)], 1)
        for _ in range(steps):
            moved = _step(one, with_slopes, moved)
        sampled, inside = _sample(other, moved)
        match = _correlate(one, sampled, inside[:, None]) >= least
        left, moved = left[match], moved[match]
    one, (sampled, inside) = first[left, None], _sample(second[left, None], moved)
    # Not where the blurred copy knows nothing of the other picture.
    within = 1 - functional.max_pool2d(1 - inside[:, None], _DETAIL, 1, _DETAIL // 2)
    found[left] = _correlate(one - _blurred(one), sampled - _blurred(sampled), within)
    return found


def _blurred(pictures: Tensor) -> Tensor:
    """Return the mean of the surroundings of each pixel of pictures (n, 1, h, w)."""
    return functional.avg_pool2d(functional.pad(pictures, [_DETAIL // 2] * 4, mode="replicate"), _DETAIL, 1)


def _slope(gray: Tensor, dim: int) -> Tensor:
    """Return the slopes of gray values, for a coordinate that runs from -1 to 1 over the picture."""
    return torch.gradient(gray, dim=dim)[0] * (gray.shape[dim] / 2)


def _coordinates(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the coordinates of the pixels' middles, x (1, w) and y (h, 1), from -1 to 1."""
    across, down = ((2 * torch.arange(count) + 1) / count - 1 for count in (width, height))
    return across[None], down[:, None]


def _sample(pictures: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Return moved pictures (n, c, h, w), and which pixels lie inside of them, (n, h, w) of 0 and 1."""
    x, y = _coordinates(*pictures.shape[2:])
    stretch_x, move_x, stretch_y, move_y = (moved[:, i, None, None] for i in range(4))
    grid = torch.stack(torch.broadcast_tensors(stretch_x * x + move_x, stretch_y * y + move_y), 3)
    inside = (grid.abs().amax(3) <= 1).float()
    return functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False), inside


def _step(one: Tensor, other: Tensor, moved: Tensor) -> Tensor:
    """Improve the alignment by one step; `other`: gray values and their two slopes, (n, 3, h, w)."""
    x, y = _coordinates(*one.shape[2:])
    sampled, inside = _sample(other, moved)
    gray, across, down = sampled.unbind(1)
    # The first picture is explained by these: four movements, contrast and brightness.
    causes = torch.stack([across * x, across, down * y, down, gray, torch.ones_like(gray)], 3)
    causes = (causes * inside[..., None]).flatten(1, 2)
    squares = causes.mT @ causes
    squares += torch.diag_embed(1e-4 * squares.diagonal(dim1=1, dim2=2) + 1e-6)
    products = causes.mT @ (one[:, 0] * inside).flatten(1)[..., None]
    solved = torch.linalg.solve(squares, products)[..., 0]
    # The movements were scaled by the contrast.
    contrast = solved[:, 4:5]
    change = torch.where(contrast.abs() > 0.1, solved[:, :4] / contrast, torch.zeros(()))
    start = torch.tensor([1.0, 0.0, 1.0, 0.0])
    return (moved + change.clamp(-0.1, 0.1)).clamp(start - _MOST, start + _MOST)


def _correlate(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Return the correlation (n,) of values (n, 1, h, w), with weights of 0 and 1."""
    weight = weight.flatten(1)
    total = weight.sum(1).clamp(min=1)
    centered = []
    for values in (one.flatten(1), other.flatten(1)):
        mean = (values * weight).sum(1) / total
        centered.append((values - mean[:, None]) * weight)
    spread = [(values.square().sum(1) / total).sqrt() for values in centered]
    found = (centered[0] * centered[1]).sum(1) / total / (spread[0] * spread[1]).clamp(min=_FLAT**2)
    return torch.where((spread[0] > _FLAT) & (spread[1] > _FLAT), found, torch.zeros(()))
