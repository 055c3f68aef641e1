"""TRL's trainers with our head in place of theirs: the same losses and weights, and fewer rows in the backward pass."""

from __future__ import annotations

import copy
import warnings
import zlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'mmrpt[trl]'")

from datasets import Dataset  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

from mmrpt.world.tiny_vlm import train_tokenizer  # noqa: E402
from mmrpt_kernels.integrations.trl import fused_head  # noqa: E402
from mmrpt_kernels.lm_head.head_gradients import HeadGradients  # noqa: E402

WORDS = ["the red card is left of a blue star", "two green trees stand right of a moon", "user assistant restore:"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS * 3, 512)


def tiny_llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # rows with a clear favourite: gradients of every size
    return model


def common(folder, **options) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }


def reward(completions, **_) -> list[float]:
    return [float(zlib.crc32(completion.encode()) % 3) for completion in completions]


class TokenAdvantages(GRPOTrainer):
    """(B, T) advantages, as VPPO has them: of every third token alone, the others exactly zero."""

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        kept = torch.arange(out["completion_ids"].shape[1]) % 3 == 0
        return out | {"advantages": out["advantages"][:, None] * kept}


def grpo(folder, model, tokenizer, **options) -> GRPOTrainer:
    rows = Dataset.from_list([{"prompt": text} for text in WORDS * 4])
    # The clipping range is tiny, so that later steps meet it.
    options = {"num_generations": 4, "max_completion_length": 9, "num_iterations": 2, "epsilon": 1e-3, **options}
    settings = common(folder, **options)
    return TokenAdvantages(model, [reward], args=GRPOConfig(**settings), train_dataset=rows, processing_class=tokenizer)


def sft(folder, model, tokenizer) -> SFTTrainer:
    rows = Dataset.from_list([{"text": text} for text in WORDS * 4])
    return SFTTrainer(model, args=SFTConfig(**common(folder)), train_dataset=rows, processing_class=tokenizer)


def dpo(folder, model, tokenizer) -> DPOTrainer:
    """With WPO's weights, which read every output of the head."""
    rows = [{"prompt": "the", "chosen": " red card", "rejected": f" blue {word}"} for word in WORDS] * 4
    settings = DPOConfig(**common(folder, use_weighting=True))
    return DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def trained(make, tokenizer, folder, head, **options) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The log and the weights after two steps."""
    with warnings.catch_warnings(), head:
        warnings.simplefilter("ignore")
        trainer = make(folder, tiny_llama(len(tokenizer)), tokenizer, **options)
        trainer.train()
    return trainer.state.log_history, trainer.model.state_dict()


SAME = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "reward")
SAME += ("rewards/chosen", "clip_ratio/region_mean")
EXPECTED = {grpo: {"loss", "entropy"}, sft: {"loss", "mean_token_accuracy"}, dpo: {"loss", "logits/chosen"}}


@pytest.mark.parametrize("make", EXPECTED)
def test_training_gives_the_same_losses_and_weights(make, tokenizer, tmp_path):
    theirs, their_weights = trained(make, tokenizer, tmp_path / "a", nullcontext())
    ours, our_weights = trained(make, tokenizer, tmp_path / "b", fused_head())
    assert len(ours) == len(theirs) >= 3
    seen = set()
    for own, other in zip(ours, theirs, strict=True):
        for name in SAME:
            if name in other:
                seen.add(name)
                assert own[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert EXPECTED[make] <= seen
    start = tiny_llama(len(tokenizer)).state_dict()
    for name, own in our_weights.items():
        moved = (own - start[name]).abs().max()
        assert moved > 0, f"{name} did not train"
        # Adam divides by the gradient's own size: an entry whose gradient is rounding may differ by a step, others not.
        assert (own - their_weights[name]).abs().mean() < 1e-3 * moved, name


def test_the_backward_pass_visits_the_rows_with_an_advantage_alone(tokenizer, tmp_path, monkeypatch):
    """Prompts, padding and two thirds of the response tokens have no gradient in these steps."""
    learnt: list[int] = []
    wanted: list[int] = []
    add = HeadGradients.add

    def counting(self, rows, *rest, **how):
        learnt.append(rows.shape[0])
        return add(self, rows, *rest, **how)

    class Counted(TokenAdvantages):
        def _compute_loss(self, model, inputs):
            wanted.append(int(((inputs["advantages"] != 0) & inputs["completion_mask"].bool()).sum()))
            return super()._compute_loss(model, inputs)

    monkeypatch.setattr(HeadGradients, "add", counting)
    monkeypatch.setitem(globals(), "TokenAdvantages", Counted)
    trained(grpo, tokenizer, tmp_path, fused_head(), num_iterations=1)
    assert len(wanted) == 2 and 0 < sum(wanted) == sum(learnt)
