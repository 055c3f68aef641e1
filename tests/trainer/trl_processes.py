"""PerceptionGRPOTrainer on several gloo processes: what each of them runs, started by torchrun (test_trl_processes.py).

python -m torch.distributed.run --nproc_per_node 2 tests/trainer/trl_processes.py <folder>
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor
from trl import GRPOConfig, GRPOTrainer

from mmrpt.corpus import write_jsonl
from mmrpt.integrations.trl import PerceptionGRPOTrainer, masked_dataset, processor_of
from mmrpt.policy import QwenVLPolicy
from mmrpt_kernels.integrations.guards import UnsupportedError
from mmrpt_kernels.integrations.trl import fused_head
from tests.trainer.conftest import ColourPairs, make_looking_policy, masked_colour

GROUP = 4
ROWS = 8  # of a micro-batch, over all processes
STEPS = 2
CASES = {(mode, head): (mode == "fsdp", head == "tied") for mode in ("ddp", "fsdp") for head in ("tied", "untied")}


class Fixed(PerceptionGRPOTrainer):
    """Completions are a function of step, image and place in the group, whichever process holds the row."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: dict[tuple[int, ...], list[bool]] = {}

    def _generate_single_turn(self, prompt_ids, images, *_, **__):
        completions = []
        for row, (image,) in enumerate(images):
            rng = np.random.default_rng([self.state.global_step, zlib.crc32(image.tobytes()), row % GROUP])
            completions.append(rng.integers(100, 256, rng.integers(3, 8)).tolist())
        return completions, None

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        for row, mask, advantages in zip(inputs, out["completion_mask"].bool(), out["advantages"], strict=True):
            key = (self.state.global_step, zlib.crc32(row["image"].tobytes()), len(self.kept) % GROUP)
            self.kept[key] = (advantages[mask] != 0).tolist()
        return out


def reward(completion_ids, **_) -> list[float]:
    return [float(zlib.crc32(bytes(str(ids), "ascii")) % 7) for ids in completion_ids]


def fsdp_also_on_a_cpu() -> None:
    """accelerate 1.15 takes FSDP for what only accelerators do, and trains with DDP on a CPU without a word."""
    original = AcceleratorState.__init__

    def init(self, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.FSDP):
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def forget_last_trainer() -> None:
    """accelerate keeps in this process whether the last trainer had FSDP; the process group stays."""
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def new_policy(tied: bool) -> QwenVLPolicy:
    policy = make_looking_policy()
    if tied:
        return policy
    config = copy.deepcopy(policy.model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    model = type(policy.model)(config)
    model.load_state_dict(policy.model.state_dict())
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    return QwenVLPolicy(model, policy.tokenizer, policy.image_processor)


def make_trainer(folder: Path, cls: type[GRPOTrainer], *, fsdp: bool, tied: bool, **more: Any) -> GRPOTrainer:
    world = dist.get_world_size() if dist.is_initialized() else 1
    pairs = ColourPairs()
    samples = folder.with_name(f"{folder.name}.{os.environ.get('RANK', 0)}.jsonl")
    write_jsonl(samples, [masked_colour(pairs, index).to_json() for index in range(8)])
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS // world,
        "gradient_accumulation_steps": 2,
        "num_generations": GROUP,
        "max_completion_length": 7,
        "max_steps": STEPS,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        # A step is then nearly proportional to the gradient; with a small epsilon it is the sign of its rounding.
        "adam_epsilon": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "fsdp": fsdp,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,  # whose second forward pass costs a quarter of a step
    }
    if world > 1:
        forget_last_trainer()
    policy = new_policy(tied)
    return cls(
        policy.model,
        [reward],
        args=GRPOConfig(**settings | more),
        train_dataset=masked_dataset(samples, pairs),
        processing_class=processor_of(policy),
    )


def weights_of(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    named = trainer.model.named_parameters()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named}


def trained(trainer: GRPOTrainer, checkpoint: str | None = None) -> dict[str, Any]:
    """Log and weights afterwards, and which tokens of which completion had an advantage."""
    with fused_head():
        trainer.train(resume_from_checkpoint=checkpoint)
    found = {"steps": [entry for entry in trainer.state.log_history if "loss" in entry], "weights": weights_of(trainer)}
    found["model"] = type(trainer.model_wrapped).__name__
    if isinstance(trainer, Fixed):
        found["kept"] = dict(gather_object(list(trainer.kept.items())))
    return found


def resumed(folder: Path, *, fsdp: bool, tied: bool) -> dict[str, Any]:
    """Two steps in one go, and the second of them again from the checkpoint after the first. Samples are drawn."""
    common = {"fsdp": fsdp, "tied": tied, "save_strategy": "steps", "save_steps": 1}
    whole = trained(make_trainer(folder, PerceptionGRPOTrainer, **common))
    again = trained(make_trainer(folder, PerceptionGRPOTrainer, **common), f"{folder}/checkpoint-1")
    return {"whole": whole, "again": again}


def refusal(folder: Path) -> str:
    """What the fused head says in TRL's own trainer, which nobody has told to gather the head."""
    trainer = make_trainer(folder, GRPOTrainer, fsdp=True, tied=False, max_steps=1)
    try:
        trained(trainer)
    except UnsupportedError as error:
        return str(error)
    return "nothing was refused"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    fsdp_also_on_a_cpu()
    found: dict[Any, Any] = {}
    for (mode, head), (fsdp, tied) in CASES.items():
        trainer = make_trainer(folder / f"{mode}-{head}", Fixed, fsdp=fsdp, tied=tied)
        found[mode, head] = trained(trainer)
    found["resumed", "ddp"] = resumed(folder / "resumed-ddp", fsdp=False, tied=True)
    found["resumed", "fsdp"] = resumed(folder / "resumed-fsdp", fsdp=True, tied=False)
    found["refusal"] = refusal(folder / "refusal")
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
