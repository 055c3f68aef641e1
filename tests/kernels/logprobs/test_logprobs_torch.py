"""linear_logprobs and PyTorch: refusals, compilers, autocast, modes of autograd."""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels.backends import BackendError
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.logprobs import linear_logprobs, operator
from tests.kernels.logprobs.test_logprobs import PLAIN, SMALL, call, make


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets: got shape"),
            ({"targets": torch.zeros(6, dtype=torch.int32)}, "targets: got dtype torch.int32"),
            ({"weight": torch.zeros(11, 4)}, "weight: got shape"),
            ({"temperature": 0.0}, "temperature: got 0.0"),
            ({"temperature": float("nan")}, "temperature: got nan"),
            ({"temperature": float("inf")}, "temperature: got inf"),
            ({"softcap": -1.0}, "softcap: got -1.0"),
            ({"softcap": float("inf")}, "softcap: got inf"),
            ({"logit_scale": float("-inf")}, "logit_scale: got -inf"),
            ({"chunk_size": 0}, "chunk_size: got 0"),
            ({"chunk_size": 2.5}, "chunk_size: got 2.5, expected a whole number"),
            ({"bias": torch.zeros(10)}, "bias: got shape"),
            ({"targets": torch.full((6,), 11)}, "targets: got ids from 11 to 11, expected 0 to 10"),
        ],
    )
    def test_message_names_the_argument(self, change, words):
        made = {"hidden": torch.zeros(6, 5), "weight": torch.zeros(11, 5), "targets": torch.zeros(6).long()} | change
        with pytest.raises(ValueError, match=words):
            linear_logprobs(**made)

    def test_unknown_backend(self):
        with pytest.raises(BackendError, match="expected one of"):
            linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1).long(), backend="fast")

    def test_second_derivative_raises(self, seed):
        made = make(PLAIN, seed)
        (grad,) = torch.autograd.grad(call(made, PLAIN).logps.square().sum(), made["hidden"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    def test_forward_mode_raises_where_it_would_be_dropped(self, seed):
        made = make(PLAIN, seed)
        hidden = made["hidden"].detach()

        def logps(hidden, backend):
            return call(made | {"hidden": hidden, "weight": made["weight"].detach()}, PLAIN, backend=backend).logps

        with pytest.raises(RuntimeError, match="reverse-mode derivatives only"):
            torch.func.jvp(lambda h: logps(h, "portable"), (hidden,), (hidden,))
        assert torch.func.jvp(lambda h: logps(h, "reference"), (hidden,), (hidden,))[1].any()


class TestTorch:
    def test_opcheck(self, seed):
        made = make(SMALL, seed)
        head = (made["hidden"], made["weight"], made["bias"], made["targets"])
        options = (*HeadOptions(0.8, 4.0, 1.3), *LoopOptions("portable", 4))
        for entropy in (True, False):
            torch.library.opcheck(operator.linear_logprobs, (*head, -100, entropy, *options))
        detached = tuple(t.detach() for t in head)
        rest = (torch.ones(SMALL.rows, dtype=torch.float64), None, -100, [True, True, False], *options)
        torch.library.opcheck(operator.linear_logprobs_backward, (*detached, *rest))

    def test_compiles_without_graph_break(self, seed, fresh_compiler):
        made = make(SMALL, seed, torch.float32)

        def loss(hidden, weight):
            out = call(made | {"hidden": hidden, "weight": weight}, SMALL)
            return (out.logps.exp() - out.entropy).sum()

        wrt = (made["hidden"], made["weight"])
        compiled, eager = torch.compile(loss, fullgraph=True)(*wrt), loss(*wrt)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(torch.autograd.grad(compiled, wrt), torch.autograd.grad(eager, wrt))

    @pytest.mark.parametrize("backend", ("portable", "reference"))
    def test_autocast(self, backend, seed):
        """Inputs are rounded as F.linear's would be; statistics and their precision stay float32."""
        made = make(PLAIN, seed, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            out = call(made, PLAIN, backend=backend)
        assert out.logps.dtype == out.entropy.dtype == torch.float32
        rounded = made | {n: made[n].bfloat16().double() for n in ("hidden", "weight")}
        torch.testing.assert_close(out.logps.double(), call(rounded, PLAIN).logps, rtol=0, atol=1e-5)
        out.logps.sum().backward()
        assert made["weight"].grad.dtype == torch.float32

    def test_without_gradients(self, seed):
        made = make(PLAIN, seed)
        with torch.no_grad():
            assert not call(made, PLAIN).logps.requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(call(made, PLAIN).logps, call(made, PLAIN, backend="reference").logps)
