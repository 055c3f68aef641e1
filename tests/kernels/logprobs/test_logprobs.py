"""linear_logprobs: the definition against torch, its precision, ranges, the rows that a backward visits, refusals.

What it shares with the other operators of the lm head is in tests/kernels/lm_head/test_operators.py.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrpt_kernels.backends import BackendError
from mmrpt_kernels.logprobs import linear_logprobs
from mmrpt_kernels.testing import HeadCase
from tests.kernels.lm_head.operators import DEVICE, ONE_VIEW, PLAIN, SMALL, draw, served

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
LOGPROBS = ONE_VIEW[0]


def call(made: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(LOGPROBS.call(made, **options).values())


def test_is_cross_entropy_and_categorical_entropy(seed):
    made = draw(PLAIN, seed)
    logps, entropy = call(made, backend="reference")
    logits = made["hidden"] @ made["weight"].T
    torch.testing.assert_close(logps, -F.cross_entropy(logits, made["targets"], reduction="none"))
    wanted = made["targets"] != -100
    torch.testing.assert_close(entropy[wanted], torch.distributions.Categorical(logits=logits).entropy()[wanted])


def test_order_of_bias_scale_cap_and_temperature(seed):
    made = draw(SMALL, seed)
    z = 4.0 * torch.tanh(1.3 * (made["hidden"] @ made["weight"].T + made["bias"]) / 4.0) / 0.8
    wanted = made["targets"] != -100
    expected = z.log_softmax(-1).gather(1, made["targets"].clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(call(made, backend="reference")[0][wanted], expected[wanted])


def test_gradcheck(seed):
    made = draw(SMALL, seed)

    def outputs(*leaves):
        return call(made | dict(zip(LOGPROBS.leaves, leaves, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(outputs, tuple(made[name] for name in LOGPROBS.leaves))


@pytest.fixture(params=("float32", "rounded"))
def products(request):
    """How a process multiplies float32 matrices on a CPU."""
    matmul, before = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    matmul.fp32_precision = before if request.param == "float32" else "bf16"
    yield
    matmul.fp32_precision = before


@pytest.mark.parametrize("chunk_size", (None, 4))
@pytest.mark.parametrize("backend", ("portable", "triton", "cuda"))
def test_log_prob_contract_with_bfloat16_inputs(backend, chunk_size, products, seed):
    """Within 1e-5 of float64 given the same inputs, at a large vocabulary and logits of a trained size, whatever the
    chunk, and where a process lets float32 products on a CPU round their inputs to bfloat16, which loses nothing."""
    served(LOGPROBS, backend)
    case = HeadCase("contract", 6, 64, 151_936, logit_size=4.0, ignored="none", chunk_size=chunk_size)
    with torch.no_grad():
        found = call(draw(case, seed, dtype=torch.bfloat16), backend=backend)
        truth = call(draw(case, seed, dtype=torch.bfloat16, wide=True), backend="reference")
    for value, expected in zip(found, truth, strict=True):
        assert (value.double() - expected).abs().max() < 1e-5, f"seed {seed}"


@settings(max_examples=40, deadline=None)
@given(
    vocab=st.integers(1, 40),
    size=st.sampled_from([1e-4, 1.0, 30.0, 1e4]),
    temperature=st.floats(0.05, 20.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 10_000),
)
def test_ranges(vocab, size, temperature, dtype, seed):
    case = HeadCase("law", 9, 4, vocab, logit_size=size, temperature=temperature, ignored="none", chunk_size=4)
    for backend in ("portable", "reference"):
        logps, entropy = call(draw(case, seed, dtype=dtype), backend=backend)
        assert (logps <= 0).all() and logps.isfinite().all()
        assert (entropy >= 0).all() and (entropy <= torch.tensor(math.log(vocab), dtype=entropy.dtype)).all()


def test_a_bias_that_is_the_same_for_every_word_changes_nothing(seed):
    made = draw(PLAIN, seed)
    shifted = made | {"bias": torch.full((PLAIN.vocab,), 3.0, dtype=torch.float64, device=DEVICE)}
    torch.testing.assert_close(call(shifted), call(made))


def test_leading_shapes():
    weight = torch.randn(7, 4)
    assert linear_logprobs(torch.randn(4), weight, torch.tensor(3)).logps.shape == ()
    for shape in ((2, 0), (2, 3, 5)):
        assert linear_logprobs(torch.randn(*shape, 4), weight, torch.zeros(shape).long()).logps.shape == shape


def test_triton_serves_no_float64():
    pytest.importorskip("triton")
    hidden, weight = torch.zeros(2, 3, device=DEVICE), torch.zeros(5, 3, device=DEVICE)
    with pytest.raises(BackendError, match="tensors are torch.float64"):
        linear_logprobs(hidden, weight.double(), torch.zeros(2, device=DEVICE).long(), backend="triton")
