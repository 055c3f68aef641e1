"""What a policy of any family refuses, and what it reads from tokenizer, template and head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrpt.objective import response_logps, supervised_loss
from mmrpt.policy import OwnForwardPolicy, QwenVLPolicy
from tests.trainer.family_policies import (
    IMAGE_TOKENS,
    MARKER,
    Processor,
    group_batch,
    make_family,
    make_tokenizer,
    pictures,
    rows_of,
)

EPS = torch.finfo(torch.float32).eps


def test_an_image_marker_in_a_text_is_no_image():
    policy = make_family("llava")
    (plain, marked), _ = policy.prompts(["a card", f"a {MARKER} card"], pictures())
    assert plain.count(policy.image_token_id) == marked.count(policy.image_token_id) == IMAGE_TOKENS
    assert policy.image_token_id not in policy.encode_text(f"a {MARKER} card")
    batch = policy.batch([plain], [[policy.image_token_id]], policy.pixels(pictures()[:1]), [0])
    with pytest.raises(ValueError, match="row 0 holds an image token in its response"):
        policy.hidden(batch)
    with pytest.raises(ValueError, match="no image was given"):
        policy.pixels([])


def test_models_that_cannot_be_trained_are_refused(monkeypatch):
    policy = make_family("llava")
    model, processor = policy.model, policy.processor
    with monkeypatch.context() as patch:
        own = type(model).forward

        def cap(self, *args, **kwargs):
            out = own(self, *args, **kwargs)
            out.logits = torch.tanh(out.logits)
            return out

        patch.setattr(type(model), "forward", cap)
        with pytest.raises(ValueError, match="it caps or scales them"):
            policy.check_head()
    policy.check_head()
    with monkeypatch.context() as patch:
        patch.setattr(model, "get_output_embeddings", lambda: nn.Identity())
        with pytest.raises(ValueError, match="has Identity for a head: expected a decoder whose head is"):
            OwnForwardPolicy(model, processor)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "is_encoder_decoder", True)
        with pytest.raises(ValueError, match="has an encoder and a decoder"):
            OwnForwardPolicy(model, processor)
    with monkeypatch.context() as patch:
        patch.setattr(Processor, "pixels", lambda self, image: ({"pixel_values": torch.zeros(1, 3, 8, 8)}, 0))
        with pytest.raises(ValueError, match="made a prompt without an image token"):
            OwnForwardPolicy(model, processor)
    with pytest.raises(ValueError, match="model type is 'llava': expected one of qwen2_vl, qwen2_5_vl, qwen3_vl"):
        QwenVLPolicy(model, make_tokenizer(), None)


def test_inputs_that_depend_on_the_text_are_refused():
    class Crossed(Processor):
        def __call__(self, text, images, return_tensors):
            out = super().__call__(text, images, return_tensors)
            return {**out, "cross_attention_mask": out["attention_mask"][..., None]}

    policy = make_family("llava")
    with pytest.raises(ValueError, match="Crossed makes cross_attention_mask of image and text together"):
        OwnForwardPolicy(policy.model, Crossed("llava", policy.tokenizer))


def test_an_answer_ends_where_the_chat_template_ends_it():
    """Gemma 3's turns end with a marker that is not its tokenizer's end of text."""
    policy = make_family("gemma3")
    tokenizer = policy.tokenizer
    assert policy.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    again = OwnForwardPolicy(policy.model, policy.processor)
    assert again.eos_token_id == policy.eos_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token_id in again.suppressed_ids
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
    assert OwnForwardPolicy(policy.model, policy.processor).eos_token_id == tokenizer.eos_token_id


def test_a_head_with_a_bias_is_trained_with_it():
    policy = make_family("llava")
    head = policy.model.lm_head
    head.bias = nn.Parameter(torch.linspace(-3, 3, len(head.weight)))
    policy.check_head()
    prompts, pixels, groups = rows_of(policy)
    batch = group_batch(policy, prompts, groups, pixels)
    supervised_loss(policy, batch).backward()
    assert head.bias.grad.abs().max() > 0
    found = response_logps(policy, batch)
    logits = policy.model(**policy._inputs(batch)).logits
    logits[..., policy.suppressed_ids] = -torch.inf
    wanted = logits.log_softmax(-1)[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0][batch.response_mask[:, 1:]]
    assert (found[found != 0] - wanted).abs().max() < 3 * 96 * EPS * 8
