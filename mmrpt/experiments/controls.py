"""What reinforcement adds to looking, against every control."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmrpt.experiments.arms import QUESTIONS, Arm, Experiment

if TYPE_CHECKING:
    from mmrpt.engines.run import Run

CARD_WORDS = {"object": ("object", "category"), "colour": ("colour",), "position": ("position",)}  # a card's, by kind


def which_card(run: Run, arm: Arm) -> dict[str, Any]:
    """Of objects, colours and positions asked for with the image: how often the answer is right where there is one
    card, and where there are several, and how often it is then what another card shows."""
    from mmrpt.corpus import iter_jsonl
    from mmrpt.rewards.text import extract_answer

    found: dict[str, list[bool]] = {"right, of one card": [], "right, of several": [], "another card's, of several": []}
    for row in iter_jsonl(run.folder / "answers.jsonl"):
        if row["model"] != arm.model or row["condition"] != "image" or row["kind"] not in CARD_WORDS:
            continue
        split, _, index = row["example_id"].partition("/")
        cards = run.sources.world.scene(split, int(index)).cards
        if len(cards) == 1:
            found["right, of one card"].append(row["exact"])
            continue
        shown = {getattr(card, name) for card in cards for name in CARD_WORDS[row["kind"]]} - {row["answer"]}
        found["right, of several"].append(row["exact"])
        found["another card's, of several"].append(extract_answer(row["completion"]) in shown)
    return {name: sum(hits) / len(hits) for name, hits in found.items() if hits}


CONTROLS = Experiment(
    name="controls",
    question="Does reinforcement add to looking, and more than other training of the same warm start?",
    base=(
        QUESTIONS,
        "control.kinds=[captions, captions_seconds, supervised_masks, rl_blanked, rl_random_masks, grpo]",
    ),
    arms=(
        Arm("warm start", model="warmup"),
        Arm("RL"),
        Arm("captions for RL's steps", model="control"),
        Arm("captions for RL's seconds", model="captions_seconds"),
        Arm("supervised on RL's masks for RL's seconds", model="supervised_masks"),
        Arm("RL with blanked images", model="rl_blanked"),
        Arm("RL on random masks", model="rl_random_masks"),
        Arm("GRPO: RL without VPPO's parts", model="grpo"),
    ),
    baseline="warm start",
    measure=which_card,
    method="RL",
    by_kind=True,
)

# What RL is first compared with, on images of another kind too.
FIRST_ASKED = ("warmup", "rl", "captions_seconds", "supervised_masks")
AT_EQUAL_SECONDS = tuple(arm for arm in CONTROLS.arms if arm.model in FIRST_ASKED)
