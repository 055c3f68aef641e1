"""What the operators refuse: a row is what is changed in a good call, and the message's words in their order."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mmrpt_kernels import linear_logprobs, linear_policy_loss, linear_token_divergence, linear_token_loss
from mmrpt_kernels import perception_weights as perception
from mmrpt_kernels.attention import attention_with_visual_mass, masked_attention_with_visual_mass, visual_mass

NAN, INF = float("nan"), float("inf")
ones, zeros = torch.ones, torch.zeros
META_ONE = ones((), device="meta")


def ids(*shape: int) -> torch.Tensor:
    return zeros(shape, dtype=torch.int64)


def mask(*shape: int) -> torch.Tensor:
    return ones(shape, dtype=torch.bool)


FOREIGN = torch.tensor(2.0, requires_grad=True)
HEAD = {"hidden": zeros(6, 5), "weight": zeros(11, 5), "targets": ids(6)}
TOKENS = HEAD | {"token_loss": lambda logps, entropy, rows: -logps}
LEARNING = TOKENS | {"hidden": zeros(6, 5).requires_grad_()}
POLICY = {"hidden": zeros(2, 3, 4), "weight": zeros(9, 4), "targets": ids(2, 3), "advantages": ones(2)}
POLICY |= {"response_mask": mask(2, 3)}
VIEWS = {"hidden_p": zeros(3, 8), "hidden_q": zeros(3, 8), "weight": zeros(20, 8)}
SCORES = {"scores": zeros(2, 3), "response_mask": mask(2, 3)}
QK = {"q": zeros(2, 12, 4, 8), "k": zeros(2, 12, 2, 8), "key_weights": ones(2, 12, 3)}
QKV = QK | {"v": zeros(2, 12, 2, 8)}
LSE = QK | {"lse": zeros(2, 4, 12)}
MASKED = QKV | {"attn_mask": mask(2, 1, 12, 12)}
CU = torch.tensor([0, 5, 24], dtype=torch.int32)
PACKED = {name: tensor.flatten(0, 1) for name, tensor in QKV.items()} | {"cu_seqlens_q": CU, "cu_seqlens_k": CU}

OF_THE_HEAD = [
    ({"weight": [1.0]}, r"weight: got list, expected a tensor \(V, H\).*pass a torch.Tensor"),
    ({"hidden": ids(6, 5)}, r"hidden: got dtype torch.int64, expected one of torch.float32, .*hidden.to\("),
    ({"bias": zeros(11, device="meta")}, "bias: got .*meta.*cpu.*hidden.device"),
    ({"targets": ids(4)}, "targets: got shape"),
    ({"targets": ids(6).int()}, "targets: got dtype torch.int32"),
    ({"targets": ids(6) + 11}, "targets: got ids from 11 to 11, expected 0 to 10"),
    ({"weight": zeros(11, 4)}, r"weight: got shape \(11, 4\), expected \(any, 5\).*reshape"),
    ({"weight": zeros(0, 5)}, "vocabulary"),
    ({"bias": zeros(10)}, "bias: got shape"),
    ({"temperature": 0.0}, "temperature: got 0.0"),
    ({"temperature": NAN}, r"temperature: got nan, expected a number in \(0.0, inf\)"),
    ({"temperature": INF}, "temperature: got inf"),
    ({"softcap": -1.0}, r"softcap: got -1.0, expected .*\[0.*, inf\)"),
    ({"softcap": INF}, "softcap: got inf"),
    ({"logit_scale": 0.0}, "logit_scale: got 0.0"),
    ({"logit_scale": -INF}, "logit_scale: got -inf"),
    ({"chunk_size": 0}, "chunk_size: got 0"),
    ({"chunk_size": 2.5}, "chunk_size: got 2.5, expected a whole number"),
    ({"backend": "fast"}, "expected one of"),
    *(({"compact": value}, f"compact: got {value!r}.*leave it True") for value in (22, 1, None, "yes")),
    *(({"skip_below": value}, "skip_below.*'auto'") for value in (-0.1, 1.0, "always", NAN)),
    ({"skip_below": "auto", "compact": False}, "compact=False asks that nothing does"),
]
OF_TOKEN_LOSSES = [
    (lambda logps, entropy, rows: logps.sum(), r"token_loss: got \(\)"),
    (lambda logps, entropy, rows: 1.0, "token_loss: got float"),
    (lambda logps, entropy, rows: logps[:, None] + logps, "token_loss: got"),
    (lambda logps, entropy, rows: logps * FOREIGN, "captured tensor that requires a gradient"),
    (lambda logps, entropy, rows: FOREIGN.exp() + 0 * rows, "captured tensor that requires a gradient"),
]
OF_THE_POLICY = [
    ({"hidden": zeros(6, 4)}, r"hidden: got shape \(6, 4\), expected \(B, T, H\).*hidden\[None\] for one"),
    ({"targets": ids(2, 4)}, "targets: got shape"),
    ({"targets": ids(2, 3) + 9}, "targets: got ids from 9 to 9, expected 0 to 8"),
    ({"advantages": zeros(3)}, "advantages: got shape"),
    ({"advantages": zeros(2, 3, 1)}, "advantages: "),
    ({"response_mask": ones(2, 3)}, "response_mask: got dtype"),
    ({"response_mask": mask(3, 2)}, "response_mask: got shape"),
    ({"perception_mask": ones(2, 3)}, "perception_mask: got dtype"),
    ({"trajectory_weights": ones(2, 3)}, "trajectory_weights: got shape"),
    ({"old_logps": ones(2)}, "old_logps: got shape"),
    ({"kl_coef": 0.1}, "ref_logps: got None"),
    ({"kl_coef": NAN}, "kl_coef: got nan"),
    ({"entropy_coef": -INF}, "entropy_coef: got -inf"),
    ({"kl_estimator": "k4"}, "kl_estimator: got 'k4', expected one of k1, k2, k3"),
    ({"clip_low": 1.5}, "clip_low: got 1.5"),
    ({"clip_high": -0.1}, "clip_high: got -0.1"),
    ({"dual_clip": 1.0}, "dual_clip: got 1.0"),
    ({"entropy_scope": "all"}, "entropy_scope: got 'all'"),
    ({"entropy_kind": "true"}, "entropy_kind: got 'true'"),
    ({"ratio_level": "gspo"}, "ratio_level: got 'gspo'"),
    ({"surrogate": "ppo"}, "surrogate: got 'ppo', expected one of clip, cispo"),
    ({"surrogate": "cispo", "dual_clip": 3.0}, "dual_clip: got 3.0 with surrogate 'cispo'"),
    ({"aggregation": "mean"}, "aggregation: got 'mean'"),
    ({"normalizer": 0.0}, "normalizer: got 0.0"),
    ({"normalizer": INF}, "normalizer: got inf"),
    ({"normalizer": ones(2)}, "normalizer: got shape"),
    ({"normalizer": META_ONE}, "normalizer: got device meta, expected cpu"),
    ({"temperature": -1.0}, "temperature: got -1.0"),
    ({"compact": 3}, "compact: got 3, expected True"),
]
OF_VIEWS = [
    ({"kind": "cosine"}, "kind.*'cosine'.*kl, reverse_kl, js, k3"),
    ({"kind": ()}, "kind.*empty"),
    ({"kind": "k3"}, "targets.*k3|k3.*targets"),
    ({"hidden_q": zeros(4, 8)}, r"hidden_q.*\(4, 8\).*\(3, 8\)"),
    ({"hidden_q": zeros(3, 7)}, r"hidden_q.*\(3, 7\)"),
    ({"hidden_p": zeros(3, 8).int()}, "hidden.*torch.int32"),
    ({"weight": zeros(8, 20)}, r"weight.*\(8, 20\)"),
    ({"weight_q": zeros(21, 8)}, r"weight_q.*\(21, 8\)"),
    ({"bias": zeros(8)}, r"bias.*\(8,\).*\(20,\)"),
    ({"targets": ids(2)}, r"targets.*\(2,\)"),
    ({"targets": zeros(3)}, "targets.*torch.float32.*torch.int64"),
    ({"targets": torch.tensor([0, 20, 1])}, "targets.*20.*vocabulary"),
    ({"backend": "cuda"}, "divergence.*cuda.*portable"),
]
OF_PERCEPTION = [
    ({"scores": zeros(4)}, r"scores.*\(4,\).*\(B, T\)"),
    ({"scores": zeros(0, 3)}, "scores.*empty batch"),
    ({"scores": ids(2, 3)}, "scores.*torch.int64"),
    ({"scores": torch.tensor([[0.0, NAN, 0.0], [0.0, 0.0, 0.0]])}, "NaN.*1 response tokens"),
    ({"response_mask": mask(2, 4)}, r"response_mask.*\(2, 4\).*\(2, 3\)"),
    ({"response_mask": ones(2, 3)}, "response_mask.*torch.bool"),
    ({"keep_ratio": 0.0}, r"keep_ratio.*\(0.0, 1.0\]"),
    ({"keep_ratio": 1.5}, "keep_ratio.*1.5"),
    ({"min_weight": -0.1}, "min_weight"),
    ({"max_weight": 0.5}, r"max_weight.*\[0.9, inf\)"),
    ({"scope": "global"}, "scope.*'global'.*batch, local"),
    ({"scope": "local", "group": object()}, "group.*local"),
    ({"backend": "cuda"}, "perception.*'cuda'.*portable"),
]
OF_ATTENTION = [
    ({"q": zeros(2, 3, 4)}, r"q: got shape \(2, 3, 4\), expected .* \(B, T, Hq, D\)"),
    ({"q": ids(2, 12, 4, 8)}, "q: got dtype torch.int64"),
    ({"k": zeros(2, 12, 8)}, r"k: got shape \(2, 12, 8\), expected .* \(B, S, Hkv, D\)"),
    ({"k": zeros(1, 12, 2, 8)}, r"k: got shape \(1, 12, 2, 8\)"),
    ({"k": zeros(2, 12, 2, 9)}, r"k: got shape \(2, 12, 2, 9\)"),
    ({"k": zeros(2, 12, 3, 8)}, "k: got 3 heads for 4 query heads, expected a divisor"),
    ({"key_weights": ones(2, 11)}, r"key_weights: got shape \(2, 11\)"),
    ({"key_weights": ones(1, 12, 3)}, r"key_weights: got shape \(1, 12, 3\)"),
    ({"key_weights": ones(2, 4, 12, 3)}, "key_weights: got shape .*one weight per key"),
    ({"key_weights": ids(2, 12)}, "key_weights: got dtype torch.int64"),
    ({"key_padding_mask": mask(2, 1, 12)}, "key_padding_mask: got shape"),
    ({"key_padding_mask": ones(2, 12)}, "key_padding_mask: got dtype torch.float32"),
    ({"window_size": (-2, 0)}, r"window_size: got \(-2, 0\)"),
    ({"softcap": -1.0}, "softcap: got -1.0"),
    ({"head_reduction": "sum"}, "head_reduction: got 'sum', expected 'none' or 'mean'"),
    ({"max_seqlen_q": 3}, "max_seqlen: got a length without cu_seqlens"),
    ({"cu_seqlens_q": CU, "cu_seqlens_k": CU}, r"q: got shape \(2, 12, 4, 8\).*packed"),
]
OF_VALUES = [
    ({"v": zeros(2, 12, 2, 1, 8)}, r"v: got shape \(2, 12, 2, 1, 8\)"),
    ({"v": zeros(2, 11, 2, 8)}, r"v: got shape \(2, 11, 2, 8\)"),
    ({"v": zeros(2, 12, 2, 8).double()}, "v: got dtype torch.float64"),
    ({"backend": "cuda"}, "attention: backend asks for 'cuda'"),
]
OF_A_MASS = [
    ({"lse": zeros(2, 12, 4)}, r"lse: got shape \(2, 12, 4\), expected \(2, 4, 12\)"),
    ({"query_mask": ids(2, 12)}, "query_mask: got dtype torch.int64"),
    ({"query_mask": mask(12)}, "query_mask: got shape"),
    ({"backend": "cuda"}, "visual_mass: backend asks for 'cuda'"),
]
OF_SDPA = [
    ({"softcap": 3.0}, "'sdpa.mass', which cannot.*not support: softcap;.*one of .*portable"),
    ({"window_size": (4, 0)}, "not support: window;"),
    ({"key_padding_mask": mask(2, 12)}, "not support: key_padding_mask;"),
    ({"q": zeros(2, 5, 4, 8)}, "not support: causal_suffix;"),
    ({"v": zeros(2, 12, 2, 4)}, "not support: value_dim;"),
    ({name: QKV[name].bfloat16() for name in "qkv"}, "takes torch.float32, torch.float64, the tensors are torch.bfl"),
    (PACKED, "not support: packed;"),
]
OF_MASKS = [
    ({"backend": "sdpa+mass"}, "does not support: attn_mask"),
    ({"attn_mask": mask(12, 12)}, r"attn_mask: got shape \(12, 12\)"),
    ({"attn_mask": zeros(2, 1, 12, 12)}, "attn_mask: got dtype torch.float32"),
]
OF_PACKS = [
    ({"cu_seqlens_k": None}, "cu_seqlens: got one of"),
    ({"cu_seqlens_q": torch.tensor([0, 5, 23])}, r"cu_seqlens_q: got \[0, 5, 23\], expected .* to 24"),
    ({"cu_seqlens_k": torch.tensor([0, 25, 24])}, r"cu_seqlens_k: got \[0, 25, 24\]"),
    ({"cu_seqlens_k": torch.tensor([1, 5, 24])}, r"cu_seqlens_k: got \[1, 5, 24\]"),
    ({"cu_seqlens_k": torch.tensor([0, 24])}, r"cu_seqlens_k: got shape \(2,\)"),
    ({"cu_seqlens_k": CU.float()}, "cu_seqlens_k: got dtype torch.float32"),
    ({"max_seqlen_k": 18}, "max_seqlen_k: got 18, expected at least 19"),
    ({"key_padding_mask": mask(2, 12)}, "key_padding_mask: got a mask with cu_seqlens"),
]
CALLS = {
    "logprobs": (partial(linear_logprobs, **HEAD), OF_THE_HEAD),
    "token_loss": (partial(linear_token_loss, **TOKENS), OF_THE_HEAD),
    "own_token_loss": (partial(linear_token_loss, **LEARNING), [({"token_loss": f}, w) for f, w in OF_TOKEN_LOSSES]),
    "policy_loss": (partial(linear_policy_loss, **POLICY), OF_THE_POLICY),
    "divergence": (partial(linear_token_divergence, **VIEWS), OF_VIEWS),
    "perception": (partial(perception, **SCORES), OF_PERCEPTION),
    "attention": (partial(attention_with_visual_mass, **QKV), OF_ATTENTION + OF_VALUES),
    "sdpa": (partial(attention_with_visual_mass, **QKV, backend="sdpa+mass"), OF_SDPA),
    "visual_mass": (partial(visual_mass, **LSE), OF_ATTENTION + OF_A_MASS),
    "masked_attention": (partial(masked_attention_with_visual_mass, **MASKED), OF_MASKS),
    "packed_attention": (partial(attention_with_visual_mass, **PACKED), OF_PACKS),
}


ROWS = [pytest.param(name, *row, id=f"{name}: {row[1]}") for name, (_, rows) in CALLS.items() for row in rows]


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_themselves_are_good(name):
    CALLS[name][0]()


@pytest.mark.parametrize(("name", "change", "words"), ROWS)
def test_what_is_refused_and_how_it_is_said(name, change, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        CALLS[name][0](**change)
