"""Decoded pictures that were asked for last, bounded by the bytes they take."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from PIL import Image

from mmrpt.types import PairSource


class ImageCache:
    """The images of the examples asked for last, so that rounds and epochs do not decode them again.

    Holds at most `max_bytes` of RGB; a picture that is larger by itself is not kept. May be shared by threads.
    """

    def __init__(self, source: PairSource, max_bytes: int) -> None:
        self._source, self._max_bytes, self._bytes = source, max_bytes, 0
        self._images: OrderedDict[str, Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, example_id: str) -> Image.Image:
        with self._lock:
            if example_id in self._images:
                self._images.move_to_end(example_id)
                return self._images[example_id]
        image = self._source.image(example_id)  # outside the lock, so that threads decode side by side
        with self._lock:
            if example_id not in self._images:
                self._images[example_id] = image
                self._bytes += _size(image)
            while self._bytes > self._max_bytes:
                self._bytes -= _size(self._images.popitem(last=False)[1])
        return image

    def many(self, example_ids: Sequence[str]) -> dict[str, Image.Image]:
        return {example_id: self(example_id) for example_id in example_ids}


def _size(image: Image.Image) -> int:
    return 3 * image.width * image.height
