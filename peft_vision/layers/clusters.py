"""Groups of equal size whose members point the same way: balanced k-means, the same every time."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 8


@torch.no_grad()
def balanced_clusters(rows: Tensor, count: int) -> list[int]:
    """The group of each row; sizes differ by at most one, and groups are numbered as they appear.

    Directions count, not lengths. First centers are picked as far from each other as possible;
    in each round the rows that have most to lose are given their group first.

    Args:
        rows: U x anything, float. Rows on `meta` have no direction: neighbors form groups.
        count: how many groups, 1 to U.
    """
    units = rows.shape[0]
    room = [units // count + (g < units % count) for g in range(count)]
    if rows.is_meta:
        return [g for g, size in enumerate(room) for _ in range(size)]
    points = torch.nn.functional.normalize(rows.detach().cpu().float(), dim=1)
    centers = _apart(points, count)
    groups: list[int] = []
    for _ in range(ROUNDS):
        found = _assigned(points @ centers.t(), room)
        if found == groups:
            break
        groups = found
        member = torch.nn.functional.one_hot(torch.tensor(groups), count).float()
        centers = torch.nn.functional.normalize(member.t() @ points, dim=1)
    seen = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    return [seen[group] for group in groups]


def _apart(points: Tensor, count: int) -> Tensor:
    """Rows far from each other: each next one is least like those taken."""
    taken = [int((points @ points.mean(0)).argmax())]
    nearest = points @ points[taken[0]]
    for _ in range(count - 1):
        taken.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, points @ points[taken[-1]])
    return points[taken]


def _assigned(likeness: Tensor, room: list[int]) -> list[int]:
    best = likeness.topk(min(2, likeness.shape[1]), dim=1).values
    order = torch.argsort(best[:, 0] - best[:, -1], descending=True, stable=True).tolist()
    wishes = torch.argsort(likeness, dim=1, descending=True, stable=True).tolist()
    left, groups = list(room), [0] * likeness.shape[0]
    for unit in order:
        group = next(g for g in wishes[unit] if left[g])
        left[group] -= 1
        groups[unit] = group
    return groups
