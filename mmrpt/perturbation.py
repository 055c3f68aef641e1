"""What is done to an image before the model sees it: blackened patches (VPPO), blanked, swapped."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mmrpt.types import Example, PairSource


def black_patches(height: int, width: int, *, seed: int, patch_size: int = 14, probability: float = 0.5) -> np.ndarray:
    """(height, width) bool: `patch_size` x `patch_size` patches, each true with `probability` (VPPO's perturbation).

    Patches at the right and lower edge may be cut. The draw depends on `seed` alone; at least one patch is true, so
    that a perturbed image always differs.
    """
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    rng = np.random.default_rng(seed)
    black = rng.random((rows, columns)) < probability
    if not black.any():
        black.flat[rng.integers(black.size)] = True
    return black.repeat(patch_size, 0).repeat(patch_size, 1)[:height, :width]


def blacken_patches(image: Image.Image, *, seed: int, patch_size: int = 14, probability: float = 0.5) -> Image.Image:
    """A copy of a picture with `black_patches`. What a model sees is perturbed after its processor has resized it
    (`mmrpt.families.blacken_pixels`): patches that are shrunk with a photo only make it darker."""
    pixels = np.asarray(image.convert("RGB")).copy()
    pixels[black_patches(*pixels.shape[:2], seed=seed, patch_size=patch_size, probability=probability)] = 0
    return Image.fromarray(pixels)


def blank(image: Image.Image) -> Image.Image:
    """A grey image of the same size: what is left is what the text alone tells."""
    return Image.new("RGB", image.size, (127, 127, 127))


class BlankedPairs:
    """The pairs of a source with each image blanked."""

    def __init__(self, source: PairSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return self.source[index]

    def image(self, example_id: str) -> Image.Image:
        return blank(self.source.image(example_id))
