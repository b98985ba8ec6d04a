"""How the search of an assembly is done."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search. Lengths are in units of the longest side of a part.

    Args:
        candidates: of each shape, with rotations of the cube; there are as many with others.
        rotations: size of the even grid on SO(3).
        voxel: of the volume of translations.
        radius: between two candidates.
        starts: orders of the parts that a choice begins with.
        beam: assemblies that go on.
        rounds: of choosing, settling and putting anew.
        renewed: of the beam, how many have their parts put anew.
        exchanges: pairs of parts that are tried in each other's place, in each round.
        tau: distances are cut off here.
        width: of the density of surface.
        density_weight: of the energy's third term.
        asymmetry_weight: of the asymmetry, where the whole has a mirror plane.
        patterns: of pairs that are chosen by then.
        coarse, fine: points of the template that choices and that settled assemblies are compared on.
        resolution: voxels of the template's table along its longest side; a part's has three quarters.

    Raises:
        ValueError: a value that is not positive.
    """

    candidates: int = 256
    rotations: int = 384
    voxel: float = 0.04
    radius: float = 0.05
    starts: int = 24
    beam: int = 8
    rounds: int = 2
    renewed: int = 2
    exchanges: int = 8
    tau: float = 0.1
    width: float = 0.03
    density_weight: float = 1e-3
    asymmetry_weight: float = 2.0
    patterns: int = 16
    coarse: int = 768
    fine: int = 1024
    last: int = 4096
    resolution: int = 96

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be positive.")
