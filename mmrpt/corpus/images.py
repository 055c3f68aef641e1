"""Pictures of unknown origin: where they may lie, and how they are decoded in full under limits."""

from __future__ import annotations

import errno
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmrpt.corpus.rows import BadRow, Limits, shown

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the machine's state, not the row's fault
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageFinder:
    """Finds the files that rows name, in `bases` and nowhere outside `root`, links and ".." resolved."""

    bases: tuple[Path, ...]
    root: Path

    @classmethod
    def of(cls, base: Path, limits: Limits, *more: Path) -> ImageFinder:
        """Paths are relative to data.root where that is given, or to `base`, the folder of the file that names them."""
        root = Path(limits.root) if limits.root is not None else base
        return cls(tuple(dict.fromkeys((root, base, *more))), root.resolve())

    def find(self, value: str, where: str) -> Path:
        """The regular file `value` names. Raises BadRow "image_missing" or "outside_root"."""
        if "://" in value[:12]:
            raise BadRow(where, "image_missing", f"image {shown(value)} is an address. Download it and name the file.")
        outside = None
        for base in self.bases:
            try:
                path = (base / value).resolve()
                if not path.is_relative_to(self.root):
                    outside = outside or path
                elif path.is_file():
                    return path
            except (OSError, ValueError, RuntimeError) as error:  # too long, NUL inside, links in a circle
                reason = f"image {shown(value)} cannot be looked for ({shown(str(error))}). Name an image file."
                raise BadRow(where, "image_missing", reason) from None
        if outside is not None:
            raise BadRow(
                where,
                "outside_root",
                f"image {shown(value)} lies outside {self.root}. Move it there, or set data.root to a folder that "
                "holds all images.",
            )
        raise BadRow(
            where,
            "image_missing",
            f"image {shown(value)} is missing (no such file in {', '.join(map(str, self.bases))}). Restore it or "
            "remove the row.",
        )


def decode(source: Path | bytes, name: str, where: str, limits: Limits) -> Image.Image:
    """The picture in RGB: the first frame, upright, 16 bits scaled to 8, transparent parts on white.

    The header is read first, so that nothing above the limits is ever decoded. Raises BadRow: image_format,
    image_too_large, image_shape, image_broken, image_missing.
    """
    if isinstance(source, bytes) and not source:
        raise BadRow(where, "image_broken", f"image {shown(name)} is empty. Replace it or remove the row.")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=limits.formats) as image:
            _check_size(image.size, name, where, limits)
            image.load()
            return _rgb(image)
    except (BadRow, MemoryError):
        raise
    except UnidentifiedImageError:
        reason = f"image {shown(name)} is none of {', '.join(limits.formats)}, or has no header. Convert or replace it."
        raise BadRow(where, "image_format", reason) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"image {shown(name)}: {str(error)[:120]} Scale it down or remove the row."
        raise BadRow(where, "image_too_large", reason) from None
    except Exception as error:  # decoders raise a dozen kinds: OSError, SyntaxError, struct.error, zlib.error, ...
        if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
            raise
        kind = "image_missing" if isinstance(error, FileNotFoundError | PermissionError) else "image_broken"
        got = f"{type(error).__name__}: {str(error)[:120]}"
        reason = f"image {shown(name)} cannot be decoded ({got}). Replace the file or remove the row."
        raise BadRow(where, kind, reason) from None


def _check_size(size: tuple[int, int], name: str, where: str, limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_megapixels * 1e6:
        raise BadRow(
            where,
            "image_too_large",
            f"image {shown(name)} has {width} x {height} pixels, at most {limits.max_megapixels:g} million are "
            "allowed. Scale it down or raise data.max_megapixels.",
        )
    if max(size) > limits.max_aspect_ratio * min(size):
        raise BadRow(
            where,
            "image_shape",
            f"image {shown(name)} has {width} x {height} pixels, one side may be at most "
            f"{limits.max_aspect_ratio:g} times the other. Crop it or raise data.max_aspect_ratio.",
        )


def _rgb(image: Image.Image) -> Image.Image:
    orientation = image.getexif().get(_ORIENTATION)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.new("RGB", clear.size, (255, 255, 255))
        image.paste(clear, mask=clear.getchannel("A"))
    image = image.convert("RGB")  # a copy, which does not hold the file
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits. Pillow would clip it, which makes a 16-bit picture a white page.

    16 bits are scaled by their range. Of 32-bit and real numbers the range is not known: 0 to 1 (real numbers), 0 to
    255 and 0 to 65535 are taken as such where all values lie inside, others are stretched from their least to their
    greatest.
    """
    values = np.asarray(image).astype(np.float32)
    np.nan_to_num(values, copy=False)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        steps: Sequence[float] = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next(step for step in steps if high <= step)
    values -= low
    values *= 255.0 / max(high - low, 1e-12)
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))
