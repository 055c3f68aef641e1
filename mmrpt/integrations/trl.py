"""The method inside TRL: masked samples as its dataset, and GRPO whose tokens learn by how much they need the image.

    dataset = masked_dataset("runs/demo/masked.jsonl", source)
    trainer = PerceptionGRPOTrainer(model, [format_reward, exact_reward], args=GRPOConfig(...), train_dataset=dataset,
                                    processing_class=processor)
    trainer.train()

VPPO's filter and shaping equal the ordinary loss with token-level advantages A * alpha(trajectory) * mask(token), and
GRPOTrainer takes those: `_generate_and_score_completions` is overridden, which writes them. Rewards are
mmrpt.rewards as they are. `mmrpt_kernels.integrations.trl.enable_fused_head()` besides makes the filter save work.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Qwen2_5_VLProcessor
from trl import GRPOTrainer, prepare_multimodal_messages

from mmrpt.corpus import items_at, read_jsonl, seed_of
from mmrpt.families import blacken_pixels
from mmrpt.integrations.trl_refill import replaced_rows
from mmrpt.perception import shape_and_filter
from mmrpt.perturbation import blacken_patches
from mmrpt.policy import QwenVLPolicy
from mmrpt.rollout.prompts import restore_text
from mmrpt.settings import PerceptionSettings, PromptSettings
from mmrpt.types import MaskedSample, PairSource, PixelBatch
from mmrpt_kernels import linear_token_divergence
from mmrpt_kernels.integrations.guards import UnsupportedError, check_parameters, check_version
from mmrpt_kernels.integrations.trl import VERSIONS, Head, HeadCall, fused_head, replaced_head, unshard_head

__all__ = ["PerceptionGRPOTrainer", "fused_head", "masked_dataset", "processor_of"]

# Methods of GRPOTrainer that are overridden, and their parameters in TRL 1.16.
OVERRIDDEN = {
    "_generate_and_score_completions": ("inputs",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
}


def masked_dataset(path: str | Path, source: PairSource, prompts: PromptSettings | None = None) -> Dataset:
    """Masked samples (JSON lines, as a run writes them) as a dataset for `GRPOTrainer`; images are read on demand.

    Columns: `prompt`, one user turn that asks for the span; `image`; `answer`, the span, which mmrpt.rewards read, and
    again as `solution`, where TRL's rewards look for it; `id`, `example_id` and `masked_caption`.
    """
    prompts = prompts or PromptSettings()
    samples = [MaskedSample(**row) for row in read_jsonl(path)]
    if not samples:
        raise ValueError(f"{path} holds no masked sample: expected JSON lines; run the masking stage first.")
    rows = [
        {
            "prompt": [{"role": "user", "content": restore_text(sample, prompts)}],
            "answer": sample.answer,
            "solution": sample.answer,
            "id": sample.id,
            "example_id": sample.example_id,
            "masked_caption": sample.masked_caption,
        }
        for sample in samples
    ]

    def with_images(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return batch | {"image": [source.image(example) for example in batch["example_id"]]}

    return Dataset.from_list(rows).with_transform(with_images)


class _ImageProcessor(Qwen2_5_VLProcessor):
    """The family's processor for images and text, of parts that need not be of the family's own classes: its video part
    exists only with torchvision, and transformers 4 asks for Qwen's tokenizer class."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        return None

    def save_pretrained(self, save_directory: str | Path) -> None:
        # ProcessorMixin's saves all parts, and fails at a video part that is None: no checkpoint could be written.
        self.tokenizer.save_pretrained(save_directory)
        self.image_processor.save_pretrained(save_directory)


def processor_of(policy: QwenVLPolicy) -> Qwen2_5_VLProcessor:
    """What TRL takes as `processing_class`, of a policy's own tokenizer and image processor. No video.

    For a model folder with all of its files, where torchvision is installed, `AutoProcessor` gives the same.
    """
    policy.tokenizer.padding_side = "left"  # prompts are followed by what is sampled
    policy.tokenizer.model_input_names = ["input_ids", "attention_mask"]  # a plain tokenizer of 4.x adds token types
    return _ImageProcessor(
        image_processor=policy.image_processor,
        tokenizer=policy.tokenizer,
        video_processor=None,
        chat_template=policy.tokenizer.chat_template,
    )


class PerceptionGRPOTrainer(GRPOTrainer):
    """GRPO with VPPO's perception: token filter and trajectory weights (arXiv 2510.09285) as (B, T) advantages.

    After TRL has sampled and rewarded, each response is read once more with its image and once with black patches over
    it; the divergence of the two is the token's perception. Trajectories whose advantage is zero stay out of the
    statistics, as dropped groups do in the method. Evaluation is TRL's.

    With `max_rounds`, groups without signal are sampled again, with other prompts: in all at most so many rounds of the
    whole generation batch, until each of every rank's groups has one. Groups that have none then count in no
    normaliser, as if they were not there. What a round has left over is dropped. Without it groups are TRL's own.

    Metrics: `perception/score` (mean over response tokens), `perception/kept` (share of tokens with gradient), and,
    where a sampler reports log-probs and TRL itself does not compare them, `sampling/sampling_logp_difference/mean` and
    `/max`: how far the trainer's log-probs are from the sampler's. `groups/rounds`, `groups/with_signal` (share).
    """

    def __init__(
        self, *args: Any, perception: PerceptionSettings | None = None, max_rounds: int | None = None, **kwargs: Any
    ) -> None:
        """As GRPOTrainer. `perception`: divergence, patches, share of tokens kept, lowest weight. `max_rounds`: most
        rounds of sampling for a generation batch; 1: groups without signal are dropped, None: they stay."""
        _check_overridden()
        self.perception = perception or PerceptionSettings()
        if self.perception.kind == "mass":
            raise ValueError("perception.kind is 'mass', which needs the native trainer: expected kl, k3 or js.")
        self.max_rounds = max_rounds
        super().__init__(*args, **kwargs)
        unshard_head(self.model)
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        if max_rounds is not None and rows % self.num_generations:
            raise ValueError(
                f"max_rounds is {max_rounds}, and a rank samples {rows} completions a round in groups of "
                f"{self.num_generations}, so that groups are torn apart: expected per_device_train_batch_size times "
                "steps_per_generation as a multiple of num_generations, or max_rounds=None."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer reads tensors by the model's present names and passes over what is missing. transformers saves some
        # families (Qwen2.5-VL) under the names of their first release: no weight was loaded, with one warning, and
        # training went on from the initial ones. `from_pretrained` knows both names. Adapters and FSDP's own files,
        # which Trainer refuses where there is no FSDP, are saved under present names.
        of_fsdp = self.is_fsdp_enabled or any(Path(resume_from_checkpoint).glob(f"{FSDP_MODEL_NAME}*"))
        if of_fsdp or not isinstance(self.model, PreTrainedModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        _load_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # The same fault as in `_load_from_checkpoint`: the last weights were returned as the best ones.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            return super()._load_best_model()
        _load_weights(self.model, self.state.best_model_checkpoint)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        if self.model.training and self.max_rounds is not None:
            out, inputs = self._with_full_groups(out, inputs)
        if not self.model.training or not self.perception.enabled:
            return out
        scores, logps = self._token_perception(out, inputs)
        response = out["completion_mask"].bool()
        if "tool_mask" in out:
            response = response & out["tool_mask"].bool()
        advantages = out["advantages"][:, None]
        counted = response & (advantages != 0)
        options = self.perception
        shares = {"keep_ratio": options.keep_ratio, "min_weight": options.min_weight, "max_weight": options.max_weight}
        weights = shape_and_filter(scores, counted, **shares)  # every rank must call: of all ranks' trajectories
        self._log_mean("perception/score", scores[response])
        self._log_mean("perception/kept", weights.perception_mask[counted].float())
        self._log_sampler_gap(out, logps, response)
        return out | {"advantages": advantages * weights.trajectory_weights[:, None] * weights.perception_mask}

    def _with_full_groups(
        self, out: dict[str, Any], inputs: list[dict[str, Any]]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The batch and its dataset rows, with other groups in the place of those without signal."""
        size, rounds, good = self.num_generations, 1, self.groups_with_signal(out)
        while rounds < self.max_rounds and self._of_all_ranks(len(good) - sum(good)):
            fresh_inputs = self._other_rows(rounds, len(good))
            fresh = super()._generate_and_score_completions(fresh_inputs)
            found = [group for group, has in enumerate(self.groups_with_signal(fresh)) if has]
            holes = [group for group, has in enumerate(good) if not has][: len(found)]
            pairs = list(zip(holes, found, strict=False))
            rows = [[group * size + k for group in groups for k in range(size)] for groups in zip(*pairs, strict=True)]
            if pairs:
                out = replaced_rows(out, rows[0], fresh, rows[1], self._pad_token_id())
                inputs = list(inputs)
                for old, new in zip(*rows, strict=True):
                    inputs[old] = fresh_inputs[new]
                good = [has or group in holes for group, has in enumerate(good)]
            rounds += 1
        teaches = torch.tensor(good, device=out["advantages"].device).repeat_interleave(size)
        mask = out["completion_mask"] if "tool_mask" not in out else out["completion_mask"] * out["tool_mask"]
        self._metrics["train"]["groups/rounds"].append(rounds)
        self._metrics["train"]["groups/with_signal"].append(
            self._of_all_ranks(sum(good)) / self._of_all_ranks(len(good))
        )
        tokens = self.accelerator.gather((mask * teaches[:, None]).sum()).sum()
        return out | {"advantages": out["advantages"] * teaches, "num_items_in_batch": tokens}, inputs

    def groups_with_signal(self, out: Mapping[str, Any]) -> list[bool]:
        """Of each group of this rank, whether it teaches something: by default, whether an advantage is not 0."""
        return (out["advantages"].view(-1, self.num_generations) != 0).any(-1).tolist()

    def _pad_token_id(self) -> int:
        return getattr(self.processing_class, "tokenizer", self.processing_class).pad_token_id

    def _of_all_ranks(self, count: int) -> int:
        return int(self.accelerator.reduce(torch.tensor(float(count), device=self.accelerator.device), "sum"))

    def _other_rows(self, number: int, groups: int) -> list[dict[str, Any]]:
        """Dataset rows of a further round of this step, a group's equal ones beside each other, other ones on each
        rank: a function of seed, step and round alone."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = (self.state.global_step * self.max_rounds + number) * groups * world + rank * groups
        items = items_at(first, groups, len(self.train_dataset), self.args.seed, "refill")
        return [row for row in map(self.train_dataset.__getitem__, items) for _ in range(self.num_generations)]

    @torch.no_grad()
    def _token_perception(self, out: dict[str, Any], inputs: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """Divergence of the two views and log-probs given the image, (B, T) float32 each, of every response token.

        Both views run through TRL's own scoring pass, which knows how to batch the inputs of every model family. In
        place of its head stand two others: one that keeps the hidden states of the true view, and one that compares
        the perturbed view with them and hands divergence and log-prob back in the places of log-prob and entropy.
        """
        views: list[Tensor] = []

        def keep(call: HeadCall) -> tuple[Tensor | None, ...]:
            views.append(call.hidden)
            return torch.zeros_like(call.targets, dtype=torch.float32), None, None, None, None

        def compare(call: HeadCall) -> tuple[Tensor | None, ...]:
            options = call.options()._asdict()
            found = linear_token_divergence(
                views.pop(0),
                call.hidden,
                call.weight,
                targets=call.targets,
                kind=self.perception.kind,
                bias=call.bias,
                **options,
            )
            return found.divergence.float(), found.logps_p.float(), None, None, None

        perturbed = out | {"pixel_values": self._perturbed_pixels(out, inputs)}
        training = self.model.training
        self.model.eval()  # dropout would differ between the views
        try:
            with replaced_head(Head(keep)):
                self._score(out, compute_entropy=False)
            with replaced_head(Head(compare)):
                scores, logps, _ = self._score(perturbed, compute_entropy=True)
        finally:
            self.model.train(training)
        return scores, logps

    def _score(self, out: Mapping[str, Any], *, compute_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's scoring pass over the completions of `out`, with whatever image inputs the family has."""
        taken = inspect.signature(self._get_per_token_logps_and_entropies).parameters
        return self._get_per_token_logps_and_entropies(
            self.model,
            input_ids=torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1),
            attention_mask=torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1),
            logits_to_keep=out["completion_ids"].shape[1],
            batch_size=self.args.per_device_train_batch_size,
            compute_entropy=compute_entropy,
            **{name: value for name, value in out.items() if name in taken},
        )

    def _perturbed_pixels(self, out: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> Tensor:
        """`pixel_values` of the images with black patches. The same image gets the same patches within a step.

        Families whose images come as rows of patches with a grid are perturbed after the resize, as the model sees
        them; the pictures of others before it, which then go the way that TRL sends the rows' own: with their prompts
        through the whole processor, since some options (InternVL's tiles) and the rows' borders (SmolVLM) are its own.
        Sizes do not change, so masks and counts of the batch's images hold for these too.
        """
        images = [_images_of(row) for row in inputs]
        options = {"patch_size": self.perception.patch_size, "probability": self.perception.probability}
        processor, clean = self.processing_class, out["pixel_values"]
        grid = out.get("image_grid_thw")
        if grid is not None:
            seeds = [self._patch_seed(image) for row in images for image in row]
            return blacken_pixels(PixelBatch(clean, grid), processor.image_processor, seeds, **options).pixel_values
        black = [[blacken_patches(image, seed=self._patch_seed(image), **options) for image in row] for row in images]
        prompts = [
            prepare_multimodal_messages(row["prompt"], images=views) for row, views in zip(inputs, black, strict=True)
        ]
        text = processor.apply_chat_template(prompts, tokenize=False, **self.chat_template_kwargs)
        pixels = processor(images=black, text=text, padding=True, return_tensors="pt")["pixel_values"]
        if "pixel_attention_mask" in out:  # rows are padded to the longest, which may since have been exchanged
            missing = [max(old - new, 0) for old, new in zip(clean.shape[::-1], pixels.shape[::-1], strict=False)]
            pixels = functional.pad(pixels, [side for count in missing for side in (0, count)])
        if pixels.shape != clean.shape:
            raise ValueError(
                f"perturbed pixel_values have shape {tuple(pixels.shape)}, the batch's {tuple(clean.shape)}: TRL made "
                "its own of other images than those under `image` or `images` of the rows (tools and environments add "
                "some), or by other options of the processor; train with perception=PerceptionSettings(enabled=False)."
            )
        return pixels.to(clean.device, clean.dtype)

    def _patch_seed(self, image: Image.Image) -> int:
        return seed_of(self.args.seed, self.state.global_step, zlib.crc32(image.tobytes()))

    def _log_mean(self, name: str, values: Tensor) -> None:
        """Log the mean over all ranks' values."""
        total = torch.stack([values.sum().float(), values.new_tensor(values.numel(), dtype=torch.float32)])
        total, count = self.accelerator.reduce(total, reduction="sum").tolist()
        self._metrics["train"][name].append(total / max(count, 1.0))

    def _log_sampler_gap(self, out: Mapping[str, Any], logps: Tensor, response: Tensor) -> None:
        sampled = out.get("sampling_per_token_logps")
        name = "sampling/sampling_logp_difference"
        if sampled is None or (self.use_vllm and self.vllm_importance_sampling_correction):
            return
        gap = (logps - sampled).abs()[response & ~torch.isnan(sampled)]
        self._log_mean(f"{name}/mean", gap)
        largest = gap.max() if gap.numel() else gap.new_zeros(())
        self._metrics["train"][f"{name}/max"].append(self.accelerator.gather(largest).max().item())


def _check_overridden() -> None:
    """TRL still has the methods that are overridden: it would train without the method if it called others."""
    version = check_version("trl", *VERSIONS)
    for name, parameters in OVERRIDDEN.items():
        if not hasattr(GRPOTrainer, name):
            raise UnsupportedError(
                f"trl {version}: GRPOTrainer has no `{name}`, expected that of TRL 1.16, which PerceptionGRPOTrainer "
                "overrides; install that release"
            )
        check_parameters(getattr(GRPOTrainer, name), ("self", *parameters), f"trl {version}: GRPOTrainer.{name}")


def _load_weights(model: PreTrainedModel, folder: str) -> None:
    """Load what `save_pretrained` wrote into `folder`. Raises ValueError unless it is all of the model's weights."""
    saved, info = type(model).from_pretrained(folder, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(
            f"{folder} does not hold the weights of this {type(model).__name__}: {wrong}; resume from a checkpoint of "
            "the same model, or load its weights before the trainer is made."
        )
    model.load_state_dict(saved.state_dict())


def _images_of(row: Mapping[str, Any]) -> list[Image.Image]:
    """The images of a dataset row. Raises ValueError where perception cannot be scored."""
    images = row["images"] if "images" in row else [row.get("image")]
    if not images or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(
            f"a row holds {[type(image).__name__ for image in images]} under `image` or `images`: expected PIL images "
            "in every row, which perception is scored by; load them with the dataset (datasets.Image() decodes)."
        )
    return images
