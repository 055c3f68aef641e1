"""A small drawn world whose captions know which of their words need the image."""

from mmrpt.settings import WorldConfig
from mmrpt.world.scene import Card, Scene
from mmrpt.world.world import World, WorldPairs

__all__ = ["Card", "Scene", "World", "WorldConfig", "WorldPairs"]
