"""verl's heads and ours in their place: against the released verl where it is installed, else against a stand-in.

The stand-in has the names and parameters of verl 0.9.1 and computes in eager PyTorch, so the adapter is tested without
Ray; what needs verl itself is skipped without it. Its head over a process group is a case of sharded_heads.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmrpt_kernels.integrations import guards, verl
from mmrpt_kernels.integrations.guards import SelfCheckError, UnsupportedError
from mmrpt_kernels.logprobs import LogProbs
from mmrpt_kernels.testing import assert_close_to_truth

ROOT = Path(__file__).resolve().parents[3]
PRESENT = importlib.util.find_spec("verl") is not None
needs_verl = pytest.mark.skipif(not PRESENT, reason="verl is not installed: pip install 'mmrpt[verl]'")


class FusedLinearForPPO(torch.nn.Module):
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logps = torch.log_softmax((hidden_states @ vocab_weights.t()).float() / temperature, -1)
        return logps.gather(-1, input_ids[..., None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
        raise AssertionError("verl's kernel needs a GPU")


def stand_in(monkeypatch: pytest.MonkeyPatch, version: str = "0.9.1") -> tuple[ModuleType, ModuleType]:
    made = {}
    for name in ("verl", "utils", "utils.experimental", "utils.kernel"):
        made[name] = ModuleType(name if name == "verl" else f"verl.{name}")
    functional = ModuleType("verl.utils.experimental.torch_functional")
    kernel = ModuleType("verl.utils.kernel.linear_cross_entropy")
    functional.FusedLinearForPPO = type("FusedLinearForPPO", (FusedLinearForPPO,), {})
    functional.FusedLinearForPPO.forward = FusedLinearForPPO.forward
    kernel.LinearCrossEntropy, kernel.linear_cross_entropy = LinearCrossEntropy, LinearCrossEntropy.apply
    made["utils.experimental"].torch_functional = functional
    made["utils.kernel"].linear_cross_entropy = kernel
    for module in (*made.values(), functional, kernel):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(guards.importlib.metadata, "version", lambda name: version)
    return functional, kernel


@pytest.fixture(params=["stand-in", pytest.param("installed", marks=needs_verl)])
def modules(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """(torch_functional, linear_cross_entropy) of verl."""
    if request.param == "stand-in":
        yield stand_in(monkeypatch)
    else:
        from verl.utils.experimental import torch_functional
        from verl.utils.kernel import linear_cross_entropy

        yield torch_functional, linear_cross_entropy
    verl.disable_fused_head()


def inputs(shape: tuple[int, ...], vocab: int, dtype=torch.float32):
    hidden = torch.randn(*shape, 24).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, 24) * 0.6).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, shape)


def gradients(results, leaves):
    logps, entropy = (result.reshape(-1) for result in results)
    factors = torch.linspace(-1, 1, logps.numel())
    return torch.autograd.grad((logps * factors).sum() + 0.3 * entropy.float().square().sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", [(1, 1), (2, 13), (29,)])
def test_results_and_gradients_are_those_of_verl(modules, shape, temperature, dtype):
    functional, kernel = modules
    hidden, weight, ids = inputs(shape, 131, dtype)
    head = functional.FusedLinearForPPO()
    theirs = head.forward(hidden, weight, ids, temperature)
    their_grads = gradients(theirs, (hidden, weight))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logits = wide[0] @ wide[1].T / temperature
    all_logps = torch.log_softmax(logits, -1)
    truth = (all_logps.gather(-1, ids[..., None]).squeeze(-1), -(all_logps.exp() * all_logps).sum(-1))
    true_grads = gradients(truth, wide)
    with verl.fused_head():
        ours = functional.FusedLinearForPPO().forward(hidden, weight, ids.int(), temperature)
        flat = kernel.linear_cross_entropy(hidden, weight, ids, temperature, "none")
    assert ours[0].shape == ours[1].shape == ids.shape and flat[0].shape == flat[1].shape == (ids.numel(),)
    for results in (ours, tuple(result.view(ids.shape) for result in flat)):
        for name, own, other, true in zip(("log-prob", "entropy"), results, theirs, truth, strict=True):
            assert own.dtype == torch.float32
            assert_close_to_truth(own, other, true, name=name, dtype=dtype, floor=float(logits.detach().abs().max()))
    for results in (ours, flat):
        for own, other, true in zip(gradients(results, (hidden, weight)), their_grads, true_grads, strict=True):
            assert own.dtype == dtype
            # log p + entropy: numbers of size 10 cancel, once a row. verl rounds its weight gradient at every chunk.
            rule = {"dtype": dtype, "floor": 10.0 * ids.numel(), "eager_cap": 1e4}
            assert_close_to_truth(own, other, true, name="gradient", **rule)


def test_rows_without_gradient_cost_nothing(modules, products):
    functional, _ = modules
    hidden, weight, ids = inputs((3, 20), 17)
    with verl.fused_head():
        logps, entropy = functional.FusedLinearForPPO().forward(hidden, weight, ids)
    advantages = torch.zeros(3, 20)
    advantages[1, 5:9] = 1.0
    products()
    (logps * advantages).sum().backward()
    assert products() == (0, 4, 4) and hidden.grad.any(-1).sum() == 4


def test_enable_disable_and_blocks(modules):
    functional, kernel = modules
    before = functional.FusedLinearForPPO.forward, kernel.linear_cross_entropy

    def now():
        return functional.FusedLinearForPPO.forward, kernel.linear_cross_entropy

    verl.enable_fused_head()
    outer = now()
    assert all(ours is not theirs for ours, theirs in zip(outer, before, strict=True))
    with pytest.raises(ZeroDivisionError), verl.fused_head():
        assert now()[0] is not outer[0]
        raise ZeroDivisionError
    assert now() == outer
    verl.enable_fused_head()
    verl.disable_fused_head()
    assert now() == before
    verl.disable_fused_head()
    assert now() == before


def test_reductions_are_refused(modules):
    _, kernel = modules
    hidden, weight, ids = inputs((4,), 7)
    with verl.fused_head(), pytest.raises(UnsupportedError, match="reduction='mean'"):
        kernel.linear_cross_entropy(hidden, weight, ids, 1.0, "mean")


def test_modules_that_hold_the_function_get_ours_and_their_own_back(modules, monkeypatch):
    """verl's Megatron modules import the function by name: some before the adapter is enabled, some while it is."""
    _, kernel = modules
    theirs = kernel.linear_cross_entropy
    early, late = "verl.models.mcore.model_forward_fused", "verl.models.a_name_of_another_release"
    monkeypatch.setitem(sys.modules, early, ModuleType(early))
    sys.modules[early].linear_cross_entropy = theirs
    with verl.fused_head():
        assert sys.modules[early].linear_cross_entropy is kernel.linear_cross_entropy is not theirs
        monkeypatch.setitem(sys.modules, late, ModuleType(late))
        sys.modules[late].linear_cross_entropy = kernel.linear_cross_entropy
    for name in (early, late):
        assert sys.modules[name].linear_cross_entropy is theirs


def test_the_first_batch_is_checked(modules, monkeypatch):
    functional, kernel = modules
    true = verl.linear_logprobs
    monkeypatch.setattr(
        verl, "linear_logprobs", lambda *a, **k: LogProbs(true(*a, **k).logps - 0.5, true(*a, **k).entropy)
    )
    with verl.fused_head(), pytest.raises(SelfCheckError, match="log-probability: max error"):
        functional.FusedLinearForPPO().forward(*inputs((2, 13), 31))
    with verl.fused_head(self_check=False):
        functional.FusedLinearForPPO().forward(*inputs((2, 13), 31))


def other_forward(functional, kernel) -> None:
    functional.FusedLinearForPPO.forward = lambda self, hidden_states, weight, ids: None


def other_kernel(functional, kernel) -> None:
    kernel.LinearCrossEntropy = type("Other", (), {"forward": staticmethod(lambda ctx, hidden, weight: None)})


UNKNOWN = [(version, None, f"verl: got {version}, expected >=0.9,<0.10") for version in ("0.8.3", "0.10.0", "1.0")]
UNKNOWN += [("0.9.1", change, "expected .*: an unknown release") for change in (other_forward, other_kernel)]


@pytest.mark.parametrize(("version", "change", "words"), UNKNOWN)
def test_an_unknown_release_is_refused(monkeypatch, version, change, words):
    modules = stand_in(monkeypatch, version)
    if change is not None:
        change(*modules)
    before = modules[0].FusedLinearForPPO.forward
    with pytest.raises(UnsupportedError, match=words):
        verl.enable_fused_head()
    assert modules[0].FusedLinearForPPO.forward is before and not verl._replaced


# ---- the entry point ----


def plugin(monkeypatch, value: str | None):
    if value is None:
        monkeypatch.delenv("MMRPT_VERL", raising=False)
    else:
        monkeypatch.setenv("MMRPT_VERL", value)
    monkeypatch.delitem(sys.modules, "mmrpt_kernels.integrations.verl_plugin", raising=False)
    return importlib.import_module("mmrpt_kernels.integrations.verl_plugin")


def test_the_entry_point_names_the_plugin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["verl.plugins"] == {"mmrpt": "mmrpt_kernels.integrations.verl_plugin"}


@pytest.mark.parametrize(("value", "enabled"), [(None, False), ("0", False), ("", False), ("1", True)])
def test_the_plugin_is_off_unless_asked_for(monkeypatch, caplog, value, enabled):
    functional, _ = stand_in(monkeypatch)
    before = functional.FusedLinearForPPO.forward
    try:
        plugin(monkeypatch, value)
        assert (functional.FusedLinearForPPO.forward is not before) == enabled
        assert ("linear_logprobs" in caplog.text) == enabled
    finally:
        verl.disable_fused_head()


@pytest.mark.parametrize(
    ("value", "version", "message"), [("1", "0.11.0", "cannot be enabled: verl: got 0.11.0"), ("yes", "0.9.1", "'yes'")]
)
def test_the_plugin_ends_a_run_that_it_cannot_serve(monkeypatch, value, version, message):
    stand_in(monkeypatch, version)
    with pytest.raises(SystemExit, match=message):
        plugin(monkeypatch, value)


# ---- with the released verl alone ----


def import_verl(folder: Path, code: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs code in a process where this package's entry points are installed, as after `pip install mmrpt`."""
    info = folder / "mmrpt-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mmrpt\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nmmrpt = mmrpt_kernels.integrations.verl_plugin\n")
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)


SHOW = """
import verl
from verl.utils.experimental.torch_functional import FusedLinearForPPO
print(FusedLinearForPPO.forward.__module__)
"""


@needs_verl
@pytest.mark.slow
def test_importing_verl_loads_the_plugin(tmp_path):
    assert import_verl(tmp_path, SHOW).stdout.strip().endswith("verl.utils.experimental.torch_functional")
    done = import_verl(tmp_path, SHOW, MMRPT_VERL="1")
    assert done.stdout.strip().endswith("mmrpt_kernels.integrations.verl"), done.stdout + done.stderr
    assert "linear_logprobs" in done.stderr
    failed = import_verl(tmp_path, SHOW, MMRPT_VERL="on")
    assert failed.returncode == 1 and "MMRPT_VERL: got 'on'" in failed.stderr and not failed.stdout.strip()


@needs_verl
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_that_verl_patched(backend):
    """Log-probs, entropies and gradients of a whole model through verl's own forward function. Without ours, its Triton
    head needs a GPU: both are compared with its PyTorch head."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    config = LlamaConfig(
        vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(211, (1, 23))

    def run(backend: str):
        model.__class__ = type("Patched", (LlamaForCausalLM,), {})
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
        out = model(input_ids=ids, temperature=0.8, return_dict=True)
        results = out.log_probs.squeeze(0), out.entropy.squeeze(0)
        return results, gradients(results, [model.lm_head.weight, model.model.embed_tokens.weight])

    theirs, their_grads = run("torch")
    with verl.fused_head():
        ours, our_grads = run(backend)
    for own, other in zip((*ours, *our_grads), (*theirs, *their_grads), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
