"""Render the scenes of the rendered world: python -m mmrpt.world.rendered.make. Run only to change them.

Needs `pip install 'mmrpt[rendered]'` (Mitsuba 3). What stands where follows from the seed on every machine, but for a
solid at the very edge of what is refused; pixels are the same bytes on one machine, and may differ by rounding on other
CPUs or with other releases of Mitsuba and of the WebP encoder. Finished parts are kept, so that a call that was cut off
goes on from there, and `SIZES` can be raised by whole parts; remove them after a change of this file or of the plans.
1,000 scenes take about eight minutes of one core.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmrpt.world.draws import Draws
from mmrpt.world.rendered.atlas import ATLAS, IMAGE_SIZE, SIZES, Part, read_part, write_atlas, write_part
from mmrpt.world.rendered.scene import COLOURS, HEIGHT, Plan, PlannedSolid, RenderedScene, Solid, draw_cells, plan_scene

SEED = 20_261
SAMPLES = 16  # light paths of a pixel
QUALITY = 88  # of WebP
LEAST_VISIBLE = 0.6  # share of a solid's pixels that no other may hide
PART = 100  # scenes
ATTEMPTS = 1_000
FACETS = 64  # of round solids
MITSUBA = "3.9.1"  # the release that made the scenes of the package


class Renderer:
    """Plans to pixels and masks, by Mitsuba's scalar variant: no compiler, no GPU."""

    def __init__(self, threads: int = 1) -> None:
        try:
            import drjit
            import mitsuba
        except ImportError as error:
            raise SystemExit(f"{error}: rendering needs Mitsuba 3: pip install 'mmrpt[rendered]'") from error
        mitsuba.set_variant("scalar_rgb")
        drjit.set_thread_count(threads)
        self.mi, self.T = mitsuba, mitsuba.ScalarTransform4f
        self.folder = tempfile.TemporaryDirectory()
        self.meshes = {name: self._mesh(name, *build()) for name, build in MESHES.items()}

    def image(self, plan: Plan, seed: int) -> Image.Image:
        """The RGB picture."""
        scene = self._scene(plan, {"type": "path", "max_depth": 3}, SAMPLES, "gaussian")
        bitmap = self.mi.Bitmap(self.mi.render(scene, seed=seed))
        pixels = bitmap.convert(self.mi.Bitmap.PixelFormat.RGB, self.mi.Struct.Type.UInt8, srgb_gamma=True)
        return Image.fromarray(np.array(pixels))

    def masks(self, plan: Plan) -> list[np.ndarray]:
        """(H, W) bool of each solid: the pixels in which the camera sees it."""
        scene = self._scene(plan, {"type": "aov", "aovs": "which:shape_index"}, 1, "box")
        which = np.array(self.mi.render(scene, seed=0))[..., -1]
        names = [None, *(shape.id() for shape in scene.shapes())]  # 0: nothing there
        return [which == names.index(f"solid_{solid.cell}") for solid in plan.solids]

    def _mesh(self, name: str, vertices: np.ndarray, faces: np.ndarray) -> str:
        mesh = self.mi.Mesh(name, len(vertices), len(faces))
        parameters = self.mi.traverse(mesh)
        parameters["vertex_positions"] = vertices.astype(np.float32).ravel()
        parameters["faces"] = faces.astype(np.uint32).ravel()
        parameters.update()
        path = str(Path(self.folder.name) / f"{name}.ply")
        mesh.write_ply(path)
        return path

    def _scene(self, plan: Plan, integrator: dict[str, Any], samples: int, filter_type: str) -> Any:
        look_at, lamp = self.T().look_at, 11.5 * plan.brightness
        film = {"type": "hdrfilm", "width": IMAGE_SIZE, "height": IMAGE_SIZE, "rfilter": {"type": filter_type}}
        parts: dict[str, Any] = {
            "type": "scene",
            "integrator": integrator,
            "sensor": {
                "type": "perspective",
                "fov": 32,
                "to_world": look_at(origin=plan.eye, target=plan.target, up=[0, 0, 1]),
                "film": film,
                "sampler": {"type": "multijitter", "sample_count": samples},
            },
            "sky": {"type": "constant", "radiance": 0.62},
            "lamp": {
                "type": "rectangle",
                "to_world": look_at(origin=plan.lamp, target=[0, 0, 0], up=[0, 1, 0]) @ self.T().scale(1.6),
                "emitter": {"type": "area", "radiance": lamp},
            },
            "ground": {
                "type": "rectangle",
                "to_world": self.T().scale(40),
                "bsdf": {"type": "diffuse", "reflectance": {"type": "rgb", "value": plan.ground}},
            },
        }
        for solid in plan.solids:
            parts[f"solid_{solid.cell}"] = self._solid(solid)
        return self.mi.load_dict(parts, parallel=False, optimize=False)

    def _solid(self, solid: PlannedSolid) -> dict[str, Any]:
        place = self.T().translate([solid.x, solid.y, 0]) @ self.T().rotate([0, 0, 1], solid.turn)
        place = place @ self.T().scale(solid.size)
        metal = solid.material == "metal"
        surface = {
            "type": "principled",
            "base_color": {"type": "rgb", "value": COLOURS[solid.colour]},
            "metallic": 0.9 if metal else 0.0,
            "roughness": 0.2 if metal else 0.8,
            "specular": 0.5 if metal else 0.2,
        }
        half = HEIGHT[solid.object] / 2
        if solid.object == "cube":
            shape = {"type": "cube", "to_world": place @ self.T().translate([0, 0, half]) @ self.T().scale(half)}
        elif solid.object == "sphere":
            shape = {"type": "sphere", "to_world": place @ self.T().translate([0, 0, half])}
        else:
            # Facets of straight sides are flat: shared normals would blacken the edges.
            flat = solid.object != "ring"
            shape = {"type": "ply", "filename": self.meshes[solid.object], "to_world": place, "face_normals": flat}
        return shape | {"bsdf": surface}


def _turned(profile: list[tuple[float, float]], closed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(V, 3) vertices and (F, 3) faces of a profile (radius, height) turned about the vertical."""
    angle = 2 * math.pi * np.arange(FACETS) / FACETS
    vertices = np.array([[r * math.cos(a), r * math.sin(a), z] for r, z in profile for a in angle])
    faces = []
    for low in range(len(profile) if closed else len(profile) - 1):
        high = (low + 1) % len(profile)
        for i in range(FACETS):
            a, b = low * FACETS + i, low * FACETS + (i + 1) % FACETS
            c, d = high * FACETS + i, high * FACETS + (i + 1) % FACETS
            faces += [(a, b, d), (a, d, c)]
    return vertices, np.array(faces)


def _cone() -> tuple[np.ndarray, np.ndarray]:
    return _turned([(1.0, 0.0), (1e-4, HEIGHT["cone"])], closed=False)


def _cylinder() -> tuple[np.ndarray, np.ndarray]:
    return _turned([(0.85, 0.0), (0.85, HEIGHT["cylinder"]), (1e-4, HEIGHT["cylinder"])], closed=False)


def _ring() -> tuple[np.ndarray, np.ndarray]:
    thick = HEIGHT["ring"] / 2
    angle = 2 * math.pi * np.arange(32) / 32
    return _turned([(0.72 + thick * math.cos(a), thick * (1 + math.sin(a))) for a in angle], closed=True)


MESHES = {"cone": _cone, "cylinder": _cylinder, "ring": _ring}


def make_scene(
    renderer: Renderer, split: str, number: int, index: int, seen: set[str]
) -> tuple[RenderedScene, Image.Image]:
    """Scene `index` of a split: the first plan that no other scene of `seen` has, with all solids in the picture and
    none mostly hidden. Its cells are drawn once, so that plans that fail do not make some rarer."""
    cells = draw_cells(Draws(SEED, number, index, ATTEMPTS), split)
    for attempt in range(ATTEMPTS):
        plan = plan_scene(Draws(SEED, number, index, attempt), cells, split)
        if not plan.is_free() or (split != "one_solid" and plan.signature() in seen):
            continue
        solids = [_measured(renderer, plan, i, mask) for i, mask in enumerate(renderer.masks(plan))]
        if all(solids):
            return RenderedScene(tuple(solids), IMAGE_SIZE), renderer.image(plan, seed=index)
    raise RuntimeError(f"no scene {index} of {split} in {ATTEMPTS} plans: lower LEAST_VISIBLE or the number of scenes.")


def _measured(renderer: Renderer, plan: Plan, which: int, mask: np.ndarray) -> Solid | None:
    """The solid's truth by its mask in the scene and alone; None where it is hidden or leaves the picture."""
    solid = plan.solids[which]
    (whole,) = renderer.masks(replace(plan, solids=(solid,))) if len(plan.solids) > 1 else (mask,)
    touches = whole[[0, -1]].any() or whole[:, [0, -1]].any()
    share = mask.sum() / max(1, whole.sum())
    if touches or share < LEAST_VISIBLE:
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Solid(solid.object, solid.colour, solid.material, solid.cell, box, round(float(min(share, 1.0)), 2))


def make_parts(folder: Path, sizes: Mapping[str, int], renderer: Renderer) -> Iterator[Part]:
    """Renders the parts that are not in `folder` yet, and yields each: its split, scenes and WebP files."""
    seen = {scene.signature() for path in sorted(folder.glob("*.part")) for scene in read_part(path).scenes}
    for number, (split, size) in enumerate(sizes.items()):
        for first in range(0, size, PART):
            path = folder / f"{split}-{first:05d}.part"
            if not path.exists():
                part = Part(split, [], [])
                for index in range(first, min(first + PART, size)):
                    scene, image = make_scene(renderer, split, number, index, seen)
                    file = io.BytesIO()
                    image.save(file, "WEBP", quality=QUALITY, method=6)
                    part.scenes.append(scene)
                    part.images.append(file.getvalue())
                    seen.add(scene.signature())
                write_part(path, part)
            yield read_part(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(str(ATLAS)), help="folder of the scenes")
    parser.add_argument("--parts", type=Path, default=Path("runs/rendered-parts"), help="folder of unfinished work")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    args.parts.mkdir(parents=True, exist_ok=True)
    parts = []
    for part in make_parts(args.parts, SIZES, Renderer(args.threads)):
        parts.append(part)
        print(f"{part.split}: {sum(len(p.scenes) for p in parts if p.split == part.split)} of {SIZES[part.split]}")
    size = write_atlas(args.out, parts)
    print(f"{args.out}: {sum(len(part.scenes) for part in parts)} scenes, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
