"""A synthetic run folder, small and whole, in the trainer's file formats: what plots and reports are tested on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

# Right answers of 200 by (model, set, condition): made up, so that tests can assert on what is drawn and written.
CORRECT = {
    ("warmup", "new_scenes"): (80, 50, 30),
    ("warmup", "new_combinations"): (70, 48, 28),
    ("warmup", "new_style"): (60, 46, 32),
    ("rl", "new_scenes"): (124, 52, 24),
    ("rl", "new_combinations"): (110, 50, 22),
    ("rl", "new_style"): (90, 48, 26),
    ("control", "new_scenes"): (96, 51, 29),
    ("control", "new_combinations"): (84, 49, 27),
    ("control", "new_style"): (75, 47, 30),
}
QUESTIONS = 200
THRESHOLD = 0.3
SKIPPED_STEP = 4  # of reinforcement: its metrics are NaN
CAPTION = ("There are three red foxes on a blue card. ", "It is a quiet day | so they say. ", "The card is *blue*.")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluation_rows() -> list[dict[str, Any]]:
    rows = []
    for (model, name), numbers in CORRECT.items():
        for condition, correct in zip(("image", "blanked", "swapped"), numbers, strict=True):
            half = correct // 2
            by_kind = {"colour": [half / 100, 100], "count": [(correct - half) / 100, 100]}
            row = {"model": model, "set": name, "condition": condition}
            rows.append(row | {"accuracy": correct / QUESTIONS, "count": QUESTIONS, "by_kind": by_kind})
    return rows


def answer_rows() -> list[dict[str, Any]]:
    """The answers behind CORRECT: a model with more right answers has those of a worse one right as well."""
    rows = []
    for (model, name), numbers in CORRECT.items():
        for condition, correct in zip(("image", "blanked", "swapped"), numbers, strict=True):
            for question in range(QUESTIONS):
                right = question < correct
                word = "red" if right else "blue"
                row = {"model": model, "set": name, "condition": condition, "sample_id": f"{name}/{question}#0"}
                row |= {"example_id": f"{name}/{question}", "answer": "red", "masked_caption": "A <mask> fox."}
                row |= {"completion": f"<think> A {word} fox.</think><answer> {word}</answer>", "exact": right}
                rows.append(row)
    return rows


def metric_rows(rng: np.random.Generator, warmup: int = 60, rl: int = 80) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(warmup):
        loss = 1 + 3 * math.exp(-step / 15) + 0.05 * rng.standard_normal()
        rows.append({"phase": "warmup", "step": step, "seconds": 0.2, "loss": loss, "lr": 1e-3})
    for step in range(rl):
        accuracy = float(np.clip(0.35 + 0.3 * step / rl + 0.06 * rng.standard_normal(), 0, 1))
        row = {"phase": "rl", "step": step, "seconds": 1.1, "accuracy": accuracy, "reward": accuracy + 0.12}
        row |= {"reward_std": 0.4, "format": 0.97, "groups_kept": 0.6, "kept_token_rate": 0.43, "loss": 0.01}
        row |= {"entropy": 0.8 - 0.3 * step / rl, "grad_norm": 0.5, "clip_fraction_high": 0.01, "perception_mean": 0.2}
        row |= {"response_length": 9.5, "approx_kl": 1e-6, "clip_fraction_low": 0.002, "skipped": False}
        rows.append(row)
    rows[warmup + SKIPPED_STEP] |= {"reward": math.nan, "accuracy": math.nan, "skipped": True}
    for step in range(rl):
        loss = 1 - 0.2 * step / rl + 0.05 * rng.standard_normal()
        rows.append({"phase": "control", "step": step, "seconds": 0.2, "loss": loss, "lr": 1e-3})
    return rows


def score_rows(rng: np.random.Generator, examples: int = 60) -> list[dict[str, Any]]:
    rows = []
    for index in range(examples):
        start = 0
        for number, sentence in enumerate(CAPTION):
            needs = number != 1
            text, words = sentence.strip(), sentence.split()
            spans, place = [], start
            for word in words:
                place = start + sentence.index(word, place - start)
                spans.append([place, place + len(word)])
                place += len(word)
            score = round(float(rng.normal(0.45 if needs else 0.25, 0.1)), 2)  # rounded: ties
            masses = [round(float(value), 3) for value in rng.uniform(0.1, 0.9, len(words))]
            row = {"example_id": f"train/{index}", "sentence": number, "start": start, "end": start + len(text)}
            row |= {"score": score, "token_spans": spans, "token_scores": masses, "needs_image": needs, "text": text}
            rows.append(row)
            start += len(sentence)
    return rows


def masked_rows(examples: int = 60) -> list[dict[str, Any]]:
    caption = "".join(CAPTION)
    start = caption.index("red")
    hidden = caption[:start] + "<mask>" + caption[start + 3 :]
    common = {"masked_caption": hidden, "answer": "red", "start": start, "end": start + 3, "sentence": 0}
    common |= {"sentence_score": 0.5, "span_score": 0.6, "kind": "colour", "needs_image": True}
    return [{"id": f"train/{i}#0", "example_id": f"train/{i}"} | common for i in range(examples)]


def sample_rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for step in (0, 40, 79):
        for index in range(4):
            for rollout in range(4):
                word = "red" if rng.random() < 0.3 + step / 160 else ("blue", "green")[rollout % 2]
                tokens = ["<think>", "Ġit", "Ġis", "Ġ" + word, "</think>", "<answer>", word, "</answer>"]
                perception = [0.001, 0.01, 0.02, 1.5, 0.0, 0.003, 0.9, 1e-5]
                row = {"step": step, "sample_id": f"train/{index}#0", "example_id": f"train/{index}"}
                row |= {"masked_caption": masked_rows(1)[0]["masked_caption"], "answer": "red"}
                row |= {"completion": f"<think> it is {word}</think><answer>{word}</answer>", "tokens": tokens}
                row |= {"reward": 1.3 if word == "red" else 0.1, "advantage": 0.5, "perception": perception}
                rows.append(row | {"kept": [value > 0.005 for value in perception]})
    return rows


def perception_rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for step in range(20):
        tokens = np.exp(rng.normal(-4, 2.2, 200)).round(6).tolist()
        rows.append({"step": step, "token_scores": tokens, "trajectory_scores": rng.gamma(3, 0.05, 24).tolist()})
    return rows


def settings() -> dict[str, Any]:
    tree: dict[str, Any] = {"name": "synthetic", "seed": 3, "warmup": {"steps": 60}, "control": {"kinds": ["captions"]}}
    return tree | {"rl": {"steps": 80, "optimiser": {"lr": 1e-3}}, "perception": {"keep_ratio": 0.4}}


def make_run(folder: Path, seed: int = 0) -> Path:
    """Write a whole run into `folder` and return it."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings()))
    environment = {"commit": "abc1234", "machine": {"cores": 2}, "versions": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    write_lines(folder / "metrics.jsonl", metric_rows(rng))
    write_lines(folder / "scores.jsonl", score_rows(rng))
    write_lines(folder / "masked.jsonl", masked_rows())
    write_lines(folder / "samples.jsonl", sample_rows(rng))
    write_lines(folder / "perception.jsonl", perception_rows(rng))
    write_lines(folder / "answers.jsonl", answer_rows())
    seconds = {"warmup": 60.0, "scoring": 12.0, "rl": 150.0, "control": 40.0, "evaluation": 20.5}
    (folder / "seconds.json").write_text(json.dumps(seconds))
    evaluation = {"rows": evaluation_rows(), "dependency_auc": 0.9125}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    masking = {"threshold": THRESHOLD, "method": "otsu", "sentences": 180, "dependent": 117, "samples": 60}
    masking["samples_needing_image"] = 1.0
    (folder / "masking.json").write_text(json.dumps(masking))
    for name in ("new_scenes", "new_combinations", "new_style"):
        Image.new("RGB", (56, 56), "red").save(folder / f"images/{name}_3.png")
    for index in range(4):
        for suffix, grey in (("", 200), ("_blanked", 127), ("_perturbed", 60)):
            Image.new("RGB", (56, 56), (grey, 90, 30 * index)).save(folder / f"images/train_{index}{suffix}.png")
    return folder
