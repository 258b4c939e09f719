"""How the heads of one attention module are routed, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class HeadRouting:
    """How one attention module routes.

    Attributes:
        routed: heads that are routed. `shared`: heads that serve every token.
        share: of the patches that a routed head serves ("head"), or of the routed heads that serve
            a patch ("token"), in (0, 1].
        choice: who chooses: each head its tokens, or each token its heads.
        soft: gates scale the heads' outputs; otherwise they are one for whom is served.
        by_norm: rank by the norm of the queries, without parameters.
        protect: how many first tokens every head serves.
        anneal: training forwards until the share is reached. `balance`: weight of the load balance.
    """

    routed: tuple[int, ...]
    shared: tuple[int, ...]
    share: float
    choice: Literal["head", "token"]
    soft: bool = False
    by_norm: bool = False
    protect: int = 1
    anneal: int = 0
    balance: float = 0.0
    seed: int = 0
