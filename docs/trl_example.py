"""Masked reinforcement by TRL's GRPOTrainer on the drawn world, on a CPU: python docs/trl_example.py [folder]

On several processes: python -m torch.distributed.run --standalone --nproc_per_node 2 docs/trl_example.py [folder]

A tiny Qwen2.5-VL learns the form of an answer for some supervised steps, then GRPO with perception trains it to restore
hidden words. With a model of your own: `AutoProcessor` and `from_pretrained` instead of the first half.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from trl import GRPOConfig

from mmrpt.captions import caption_batch
from mmrpt.corpus import items_at, write_jsonl
from mmrpt.integrations.trl import PerceptionGRPOTrainer, masked_dataset, processor_of
from mmrpt.masking.build import truth_masks
from mmrpt.objective import supervised_loss
from mmrpt.policy import Policy
from mmrpt.rewards import exact_reward, format_reward
from mmrpt.settings import PerceptionSettings, PromptSettings
from mmrpt.types import Example, PairSource
from mmrpt.world import World
from mmrpt.world.tiny_vlm import TinyVLMConfig, build_tiny_vlm
from mmrpt.world.warm_start import sentence_example
from mmrpt.world.world import WorldConfig
from mmrpt_kernels.integrations.trl import fused_head

PROMPTS = PromptSettings()


class Sentences:
    """Of each pair the sentence that needs the image: short rows, so that a CPU gets through them."""

    def __init__(self, pairs: PairSource) -> None:
        self.pairs, self.image = pairs, pairs.image

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        return sentence_example(self.pairs[index], np.random.default_rng(index))


def warm_up(policy: Policy, pairs: PairSource, steps: int) -> None:
    """Supervised steps that restore hidden words: until the model knows the form and guesses."""
    optimiser = torch.optim.AdamW(policy.model.parameters(), lr=2e-3)
    for step in range(steps):
        items = items_at(16 * step, 16, len(pairs), "warm-up")
        batch = caption_batch(policy, pairs, items, PROMPTS, restore_fraction=1.0, seed=step, cut=sentence_example)
        supervised_loss(policy, batch).backward()
        optimiser.step()
        optimiser.zero_grad()


def main(argv: list[str] | None = None) -> PerceptionGRPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="runs/trl")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=400)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    pairs = Sentences(World(WorldConfig(max_cards=1, language_bias=0.0)).source("train", args.pairs))
    some = [pairs[i] for i in range(min(64, len(pairs)))]
    images = [pairs.image(example.id) for example in some]
    small = TinyVLMConfig(hidden_size=64, heads=2, kv_heads=1, layers=3, intermediate_size=176, vision_hidden_size=64)
    policy = build_tiny_vlm(small, [example.caption for example in some] + ["user assistant restore:"], images=images)
    warm_up(policy, pairs, args.warmup)

    settings = GRPOConfig(
        output_dir=args.folder,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=24,
        learning_rate=3e-4,
        epsilon_high=0.28,
        loss_type="dapo",
        reward_weights=[0.1, 1.0],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
    )
    # A run of mmrpt.train writes this file from attention; here the truth says which words need the image.
    with settings.main_process_first(local=False):  # the others wait, then read it
        if settings.process_index == 0:
            masks = [mask for i in range(len(pairs)) for mask in truth_masks(pairs[i], mask=PROMPTS.mask)]
            write_jsonl(f"{args.folder}/masked.jsonl", [mask.to_json() for mask in masks])

    with fused_head():
        trainer = PerceptionGRPOTrainer(
            policy.model,
            [format_reward, exact_reward],
            args=settings,
            train_dataset=masked_dataset(f"{args.folder}/masked.jsonl", pairs, PROMPTS),
            processing_class=processor_of(policy),
            perception=PerceptionSettings(keep_ratio=0.4),
        )
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
