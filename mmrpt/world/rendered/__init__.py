"""Rendered 3-D scenes of solids, with the truth of each, in the package as pictures (docs/rendered_world.md)."""

from mmrpt.world.rendered.scene import RenderedScene, Solid
from mmrpt.world.rendered.world import RenderedWorld

__all__ = ["RenderedScene", "RenderedWorld", "Solid"]
