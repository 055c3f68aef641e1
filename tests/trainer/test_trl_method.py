"""The method inside TRL: a real GRPOTrainer with a real (tiny) Qwen2.5-VL, its processor and masked samples."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
import zlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'mmrpt[trl]'")

from safetensors.torch import load_file, save_file  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.trainer import utils  # noqa: E402

from mmrpt.corpus import seed_of, write_jsonl  # noqa: E402
from mmrpt.integrations import trl as method  # noqa: E402
from mmrpt.integrations.trl import PerceptionGRPOTrainer, masked_dataset, processor_of  # noqa: E402
from mmrpt.perturbation import blacken_patches  # noqa: E402
from mmrpt.policy import Policy  # noqa: E402
from mmrpt.rewards import exact_reward, format_reward  # noqa: E402
from mmrpt.rewards.custom import COLUMNS  # noqa: E402
from mmrpt.settings import PerceptionSettings, PromptSettings  # noqa: E402
from mmrpt.types import MaskedSample  # noqa: E402
from mmrpt_kernels import linear_policy_loss, perception_weights  # noqa: E402
from mmrpt_kernels.integrations.guards import UnsupportedError  # noqa: E402
from mmrpt_kernels.integrations.trl import fused_head  # noqa: E402
from tests.trainer.conftest import make_looking_policy  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEMPERATURE = 1.3


@pytest.fixture
def dataset(pairs, tmp_path):
    samples = []
    for index in range(8):
        example = pairs[index]
        word = example.words[0]
        masked = example.caption[: word.start] + "<mask>" + example.caption[word.end :]
        answer = example.caption[word.start : word.end]
        samples.append(MaskedSample(f"{example.id}#0", example.id, masked, answer, word.start, word.end, 0, 0.5, 0.5))
    write_jsonl(tmp_path / "masked.jsonl", [sample.to_json() for sample in samples])
    return masked_dataset(tmp_path / "masked.jsonl", pairs)


def text_reward(completions, answer, **_) -> list[float]:
    """An untrained policy earns nothing from the real rewards; this one depends on the completion's text."""
    return [float(zlib.crc32(completion[0]["content"].encode()) % 3) for completion in completions]


def make_trainer(
    policy, dataset, folder, rewards=(text_reward,), *, perception=None, cls=PerceptionGRPOTrainer, **more
):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 7,
        "temperature": TEMPERATURE,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    extra = {} if cls is GRPOTrainer else {"perception": perception}
    rollout = {"rollout_func": more.pop("rollout_func")} if "rollout_func" in more else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(
            policy.model,
            list(rewards),
            args=GRPOConfig(**settings | more),
            train_dataset=dataset,
            processing_class=processor_of(policy),
            **extra,
            **rollout,
        )


def scored(trainer, dataset, indices=(0, 0, 0, 0, 5, 5, 5, 5)):
    """What the trainer makes of these rows."""
    trainer.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = [dataset[i] for i in indices]
        return trainer._generate_and_score_completions(inputs), inputs


def responses_of(out) -> tuple[list[list[int]], list[list[int]]]:
    """Prompt and response ids without padding, row by row."""
    parts = ((out["prompt_ids"], out["prompt_mask"]), (out["completion_ids"], out["completion_mask"]))
    return tuple([ids[mask.bool()].tolist() for ids, mask in zip(*pair, strict=True)] for pair in parts)


def log_probs(policy, prompts, responses, images):
    """(rows of (length, V)) float64 log-probabilities of every response, by transformers' own forward pass."""
    batch = policy.batch(prompts, responses, policy.pixels(images), range(len(images)))
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": batch.pixels.pixel_values,
    }
    if "mm_token_type_ids" in inspect.signature(policy.model.model.forward).parameters:
        inputs["mm_token_type_ids"] = (batch.input_ids == policy.image_token_id).int()
    with torch.no_grad():
        logits = policy.model(**inputs, image_grid_thw=batch.pixels.grid_thw).logits.double() / TEMPERATURE
    where = [mask.nonzero()[:, 0] - 1 for mask in batch.response_mask]
    return [torch.log_softmax(row[places], -1) for row, places in zip(logits, where, strict=True)]


def test_two_steps_end_to_end_with_the_fused_head(looking_policy, dataset, tmp_path):
    before = {name: p.detach().clone() for name, p in looking_policy.model.named_parameters()}
    with fused_head():
        trainer = make_trainer(looking_policy, dataset, tmp_path, [text_reward, format_reward, exact_reward])
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    for entry in steps:
        assert entry["perception/score"] > 0 and 0.4 <= entry["perception/kept"] < 0.7
        assert entry["grad_norm"] > 0 and entry["rewards/exact_reward/mean"] == 0
    moved = [name for name, p in looking_policy.model.named_parameters() if not torch.equal(p, before[name])]
    assert any("visual" in name for name in moved) and any("embed_tokens" in name for name in moved)


def test_the_score_is_the_divergence_of_the_two_views(looking_policy, dataset, pairs, tmp_path):
    """Against full logits of the plain model, row by row without padding."""
    trainer = make_trainer(looking_policy, dataset, tmp_path, max_completion_length=11)
    out, inputs = scored(trainer, dataset)
    assert len({len(r) for r in responses_of(out)[1]}) > 1 or out["completion_mask"].all()
    scores, logps = trainer._token_perception(out, inputs)
    prompts, responses = responses_of(out)
    images = [row["image"] for row in inputs]
    black = [
        blacken_patches(image, seed=seed_of(trainer.args.seed, 0, zlib.crc32(image.tobytes()))) for image in images
    ]
    true, blind = (log_probs(looking_policy, prompts, responses, view) for view in (images, black))
    for row, (p, q) in enumerate(zip(true, blind, strict=True)):
        expected = (p.exp() * (p - q)).sum(-1)
        assert expected.max() > 1e-4, "a policy that does not look would pass with any score"
        torch.testing.assert_close(scores[row, : len(p)].double(), expected, rtol=1e-4, atol=1e-5)
        chosen = p.gather(-1, torch.tensor(responses[row])[:, None])[:, 0]
        torch.testing.assert_close(logps[row, : len(p)].double(), chosen, rtol=1e-4, atol=1e-5)


def test_advantages_are_those_of_grpo_shaped_and_filtered(looking_policy, dataset, tmp_path, monkeypatch):
    plain = {}
    original = GRPOTrainer._generate_and_score_completions

    def remember(self, inputs):
        out = original(self, inputs)
        # One trajectory without an advantage: it must not move the statistics.
        out["advantages"][2] = 0.0
        plain.update(advantages=out["advantages"].clone())
        return out

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", remember)
    settings = PerceptionSettings(keep_ratio=0.3, min_weight=0.5, kind="js")
    trainer = make_trainer(looking_policy, dataset, tmp_path, perception=settings)
    out, inputs = scored(trainer, dataset)
    scores, _ = trainer._token_perception(out, inputs)
    mask = out["completion_mask"].bool()
    rows = plain["advantages"] != 0
    assert rows.sum() >= 4 and not rows[2]
    weights = perception_weights(scores[rows], mask[rows], keep_ratio=0.3, min_weight=0.5)
    expected = torch.zeros_like(scores)
    expected[rows] = plain["advantages"][rows, None] * weights.trajectory_weights[:, None] * weights.perception_mask
    torch.testing.assert_close(out["advantages"], expected)
    assert len(weights.trajectory_weights.unique()) > 1
    kept = (out["advantages"] != 0).sum(-1)[rows]
    assert torch.equal(kept, torch.ceil(0.3 * mask[rows].sum(-1)).long())


def test_trls_loss_is_then_our_policy_loss(looking_policy, dataset, tmp_path):
    """Loss and gradients of TRL's token mean equal linear_policy_loss with perception mask and trajectory weights."""
    trainer = make_trainer(looking_policy, dataset, tmp_path, loss_type="bnpo", gradient_accumulation_steps=1)
    out, inputs = scored(trainer, dataset)
    mask = out["completion_mask"].bool()
    assert out["advantages"].any()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, out)
    parameters = [looking_policy.head_weight, looking_policy.model.model.visual.patch_embed.proj.weight]
    theirs = torch.autograd.grad(loss, parameters)

    prompts, responses = responses_of(out)
    batch = looking_policy.batch(prompts, responses, looking_policy.pixels([r["image"] for r in inputs]), range(8))
    hidden = looking_policy.hidden(batch)[:, :-1]
    response = batch.response_mask[:, 1:]
    advantages = torch.zeros_like(response, dtype=torch.float32)
    advantages[response] = out["advantages"][mask]
    ours = linear_policy_loss(
        hidden,
        looking_policy.head_weight,
        batch.input_ids[:, 1:],
        advantages,
        response_mask=response,
        perception_mask=advantages != 0,
        temperature=TEMPERATURE,
    )
    torch.testing.assert_close(loss, ours.loss, rtol=1e-4, atol=1e-6)
    for own, other in zip(torch.autograd.grad(ours.loss, parameters), theirs, strict=True):
        assert own.abs().max() > 0
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * float(own.abs().max()))


def test_switched_off_and_in_evaluation_it_is_plain_grpo(looking_policy, dataset, tmp_path):
    off = make_trainer(looking_policy, dataset, tmp_path, perception=PerceptionSettings(enabled=False))
    assert scored(off, dataset)[0]["advantages"].shape == (8,)
    on = make_trainer(looking_policy, dataset, tmp_path)
    on.model.eval()
    assert on._generate_and_score_completions([dataset[0]] * 4)["advantages"].shape == (4,)


def test_attention_mass_is_no_divergence_of_two_heads(looking_policy, dataset, tmp_path):
    with pytest.raises(ValueError, match="perception.kind is 'mass', which needs the native trainer: expected kl,"):
        make_trainer(looking_policy, dataset, tmp_path, perception=PerceptionSettings(kind="mass"))


def test_the_heads_of_the_scoring_passes_do_not_stay(looking_policy, dataset, tmp_path, monkeypatch):
    trainer = make_trainer(looking_policy, dataset, tmp_path)
    before = utils._ChunkedLogProbFunction
    scored(trainer, dataset)
    assert utils._ChunkedLogProbFunction is before and trainer.model.training

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(method, "linear_token_divergence", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        scored(trainer, dataset)
    assert utils._ChunkedLogProbFunction is before and trainer.model.training


def test_the_gap_to_the_samplers_log_probs_is_logged(looking_policy, dataset, tmp_path):
    """Where another engine samples and reports what it sampled with."""
    calls = {}

    def rollout(prompts, trainer):
        ids, _, _ = trainer._tokenize_prompts(prompts)
        completions = [[300 + row, 301, 302 + row] for row in range(len(ids))]
        calls["sampled"] = [[-1.0, -2.0, float("nan")] for _ in ids]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": calls["sampled"]}

    trainer = make_trainer(looking_policy, dataset, tmp_path, rollout_func=rollout)
    out, inputs = scored(trainer, dataset)
    prompts, responses = responses_of(out)
    true = log_probs(looking_policy, prompts, responses, [row["image"] for row in inputs])
    chosen = torch.stack([p.gather(-1, torch.tensor(r)[:, None])[:, 0] for p, r in zip(true, responses, strict=True)])
    gap = (chosen[:, :2] - torch.tensor([-1.0, -2.0])).abs()
    logged = trainer._metrics["train"]
    assert logged["sampling/sampling_logp_difference/mean"] == [pytest.approx(gap.mean().item(), rel=1e-4)]
    assert logged["sampling/sampling_logp_difference/max"] == [pytest.approx(gap.max().item(), rel=1e-4)]


@pytest.mark.parametrize("image", [None, "card.png"])
def test_a_row_without_an_image_is_refused(looking_policy, dataset, tmp_path, image):
    trainer = make_trainer(looking_policy, dataset, tmp_path)
    out, inputs = scored(trainer, dataset)
    inputs[3] = inputs[3] | {"image": image}
    with pytest.raises(ValueError, match=f"a row holds \\['{type(image).__name__}'\\].*expected PIL images"):
        trainer._token_perception(out, inputs)


def test_a_family_whose_pixels_depend_on_more_is_refused(looking_policy, dataset, tmp_path):
    trainer = make_trainer(looking_policy, dataset, tmp_path)
    out, inputs = scored(trainer, dataset)
    cut = out | {"pixel_values": out["pixel_values"][:, :-1]}
    with pytest.raises(ValueError, match="pixel_values have shape .* a row of this image processor for each patch"):
        trainer._token_perception(cut, inputs)
    cut.pop("image_grid_thw")  # a family without a grid
    with pytest.raises(ValueError, match="perturbed pixel_values have shape .* the batch's"):
        trainer._perturbed_pixels(cut, inputs)


def run_of(trainer, **options):
    """Log without times, and weights, after training."""
    with warnings.catch_warnings(), fused_head():
        warnings.simplefilter("ignore")
        trainer.train(**options)
    log = [{k: v for k, v in entry.items() if k != "step_time"} for entry in trainer.state.log_history]
    return log[:-1], {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_an_interrupted_training_resumes_exactly(dataset, tmp_path):
    """Samples are drawn, Adam has its moments, the learning rate falls: all of it goes on as if nothing had been."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = make_trainer(make_looking_policy(), dataset, tmp_path, **saving)
    log, weights = run_of(trainer)
    folder = f"{tmp_path}/checkpoint-1"
    again = make_trainer(make_looking_policy(), dataset, tmp_path / "again", **saving)
    assert run_of(again, resume_from_checkpoint=folder)[0] == log and len(log) == 3
    for name, weight in again.model.named_parameters():
        assert torch.equal(weight, weights[name]), name

    # The checkpoint is a whole folder: the policy opens it, and what is loaded as the best model is that one.
    saved = dict(Policy.load(folder).model.named_parameters())
    assert Policy.load(folder).tokenizer.chat_template == processor_of(make_looking_policy()).chat_template
    trainer.state.best_model_checkpoint = folder
    trainer._load_best_model()
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, saved[name]) and not torch.equal(weight, weights[name]), name


def test_a_checkpoint_of_another_model_is_refused(looking_policy, dataset, tmp_path):
    """Where Trainer itself would go on with the initial weights and a warning."""
    trainer = make_trainer(looking_policy, dataset, tmp_path)
    trainer.save_model(tmp_path / "checkpoint")
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    (missing, *_) = [name for name in weights if name.endswith("mlp.up_proj.weight")]
    save_file({k: v for k, v in weights.items() if k != missing}, tmp_path / "checkpoint" / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not hold the weights of this Qwen2_5_VL.*up_proj\.weight"):
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    (tmp_path / "checkpoint" / "pytorch_model_fsdp.bin").touch()  # its optimiser's state could not be read either
    with pytest.raises(ValueError, match="only supported when using PyTorch FSDP"):
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))


def renamed(patch):
    patch.delattr(GRPOTrainer, "_generate_and_score_completions")


def called_otherwise(patch):
    patch.setattr(GRPOTrainer, "_load_from_checkpoint", lambda self, checkpoint: None)


@pytest.mark.parametrize(
    ("break_it", "law"),
    [
        (renamed, "GRPOTrainer has no `_generate_and_score_completions`, expected that of TRL 1.16"),
        (called_otherwise, r"takes \(self, checkpoint\), expected \(self, resume_from_checkpoint, model\)"),
    ],
)
def test_an_unknown_trl_is_refused(looking_policy, dataset, tmp_path, monkeypatch, break_it, law):
    """Without the method that is overridden, TRL would train without perception and say nothing."""
    break_it(monkeypatch)
    with pytest.raises(UnsupportedError, match=law):
        make_trainer(looking_policy, dataset, tmp_path)


def test_masked_samples_as_a_dataset(dataset, pairs, tmp_path):
    assert len(dataset) == 8
    row = dataset[3]
    example = pairs[3]
    assert row["answer"] == row["solution"] == example.caption[example.words[0].start : example.words[0].end]
    assert row["image"].tobytes() == pairs.image(example.id).tobytes()
    assert set(COLUMNS) <= row.keys() | {"prompts", "completions", "completion_ids"}  # which TRL adds
    assert "<mask>" in row["masked_caption"]
    (turn,) = row["prompt"]
    assert turn["role"] == "user" and "<mask>" in turn["content"] and row["answer"] not in turn["content"]
    completion = [{"role": "assistant", "content": f"<think> x</think><answer> {row['answer']}</answer>"}]
    assert exact_reward(completions=[completion], **{k: [v] for k, v in row.items()}) == [1.0]
    other = masked_dataset(tmp_path / "masked.jsonl", pairs, PromptSettings(restore="fill {masked_caption}"))
    assert other[0]["prompt"][0]["content"].startswith("fill ")
    write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="holds no masked sample"):
        masked_dataset(tmp_path / "empty.jsonl", pairs)


def test_the_example_of_the_docs_runs(tmp_path):
    spec = importlib.util.spec_from_file_location("trl_example", ROOT / "docs" / "trl_example.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = example.main([str(tmp_path), "--warmup", "1", "--steps", "2", "--pairs", "12"])
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2 and all("perception/score" in entry for entry in steps)
    assert utils._ChunkedLogProbFunction.__name__ == "ChunkedLogProbFunction"
