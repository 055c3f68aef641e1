"""Zero-shot on easy-VQA (PyPI: easy-vqa, MIT): one plain shape an image, asked about in the drawn world's sentences.

Its shapes (circle, rectangle, triangle) are no answers of the world, so that their names cannot be asked for; of its
eight colours the world has five. Where the shape is, no question of the data set asks; it is measured in the pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmrpt.experiments.arms import Arm, Experiment, Rows
from mmrpt.experiments.controls import AT_EQUAL_SECONDS, CONTROLS
from mmrpt.types import Example, Word

if TYPE_CHECKING:
    from mmrpt.engines.run import Run

PACKAGE = "easy-vqa"
COLOURS = {name: name for name in ("red", "yellow", "green", "blue")} | {"gray": "grey"}  # its names, the world's


@dataclass(frozen=True)
class EasyVQA:
    """Its test images as pairs, a question each: those about colours first, then those about positions."""

    examples: tuple[Example, ...]
    paths: Mapping[int, str]
    size: int  # pixels of a side that images are enlarged to

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def image(self, example_id: str) -> Image.Image:
        path = self.paths[int(example_id.partition("/")[2])]
        return Image.open(path).convert("RGB").resize((self.size, self.size))


@cache
def easy_vqa(size: int, most: int) -> EasyVQA:
    """At most `most` pairs of each kind, their images of `size` x `size` pixels."""
    from easy_vqa import get_test_image_paths, get_test_questions

    paths = get_test_image_paths()
    colours = {
        image: COLOURS[answer]
        for question, answer, image in zip(*get_test_questions(), strict=True)
        if "color" in question and answer in COLOURS
    }
    places = {image: position_of(Image.open(paths[image]).convert("RGB")) for image in sorted(paths)}
    places = {image: place for image, place in places.items() if place}
    examples = (*islice(_examples("colour", colours), most), *islice(_examples("position", places), most))
    return EasyVQA(examples, paths, size)


def _asked(run: Run) -> EasyVQA:
    return easy_vqa(run.settings.demo.world.image_size, run.settings.evaluation.samples)


def position_of(image: Image.Image) -> str | None:
    """The quarter of the image that holds the whole shape, all pixels that differ from the commonest colour; None
    where the shape reaches into two."""
    from mmrpt.world.scene import POSITIONS

    _, background = max(image.getcolors(image.width * image.height))  # (pixels, colour)
    shape = (np.asarray(image) != background).any(-1)
    cells = {
        2 * row + column
        for row, half in enumerate(np.array_split(shape, 2, axis=0))
        for column, quarter in enumerate(np.array_split(half, 2, axis=1))
        if quarter.any()
    }
    return POSITIONS[cells.pop()] if len(cells) == 1 else None


def _examples(kind: str, answers: Mapping[int, str]) -> Iterator[Example]:
    """The templates of the only card of a scene in turn, each with the image's answer."""
    from mmrpt.world.grammar import FACT_TEMPLATES

    templates = FACT_TEMPLATES[{"colour": "only card is colour", "position": "only card at position"}[kind]]
    for place, image in enumerate(sorted(answers)):
        template, answer = templates[place % len(templates)] + ".", answers[image]
        start = template.index("{0}")
        word = Word(start, start + len(answer), kind, needs_image=True)
        yield Example(f"{kind}/{image:06d}", template.format(answer), (word,))


def zero_shot(run: Run, arm: Arm) -> tuple[Rows, Rows]:
    """What the arm's model answers."""
    from mmrpt.held_out import evaluate_policy
    from mmrpt.masking.build import truth_masks

    source = _asked(run)
    samples = [sample for example in source.examples for sample in truth_masks(example, mask=run.settings.prompts.mask)]
    run.load(arm.model)
    return evaluate_policy(run.policy, arm.model, {PACKAGE: (source, samples)}, run.settings)


def majority(run: Run, arm: Arm) -> dict[str, Any]:
    """How often the commonest answer of each kind is right, for which no image is needed."""
    answers: dict[str, list[str]] = {}
    for example in _asked(run).examples:
        (word,) = example.words
        answers.setdefault(word.kind, []).append(example.caption[word.start : word.end])
    shares = {kind: Counter(given).most_common(1)[0][1] / len(given) for kind, given in answers.items()}
    return {"the commonest answer": shares}


EASY_VQA = Experiment(
    name="easy-vqa",
    question="Does what the model learnt to see on drawn cards serve on images of another kind, without training?",
    base=CONTROLS.base,
    arms=AT_EQUAL_SECONDS,
    baseline="warm start",
    method="RL",
    answer=zero_shot,
    measure=majority,
    requires=PACKAGE,
    by_kind=True,
)
