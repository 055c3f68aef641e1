"""Small worlds whose captions know which of their words need the image: drawn cards, and rendered scenes of solids."""

from mmrpt.settings import WorldConfig
from mmrpt.world.rendered import RenderedWorld
from mmrpt.world.scene import Card, Scene
from mmrpt.world.world import World, WorldPairs

__all__ = ["Card", "RenderedWorld", "Scene", "World", "WorldConfig", "WorldPairs", "open_world"]


def open_world(config: WorldConfig) -> World | RenderedWorld:
    """The world that the config names."""
    return RenderedWorld(config) if config.kind == "rendered" else World(config)
