"""TRL on two gloo processes, DDP and FSDP2, tied and untied head: the training of one process, and a resumed one."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="TRL is not installed: pip install 'mmrpt[trl]'")
if not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 asks accelerate for FSDP in a way that needs a GPU", allow_module_level=True)

from tests.trainer import trl_processes  # noqa: E402
from tests.trainer.torchrun import torchrun  # noqa: E402
from tests.trainer.trl_processes import CASES, STEPS, Fixed, make_trainer, new_policy, trained  # noqa: E402

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes found, by one torchrun for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    child = torchrun(2, trl_processes.__file__, str(folder))
    assert child.returncode == 0, child.stdout[-6000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[bool, dict]:
    """The same training on one process, by whether the head is tied."""
    folder = tmp_path_factory.mktemp("alone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {tied: trained(make_trainer(folder / str(tied), Fixed, fsdp=False, tied=tied)) for tied in (True, False)}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_train_as_one(case, ranks, alone):
    fsdp, tied = CASES[case]
    found, expected = ranks[0][case], alone[tied]
    assert found["model"].startswith("FSDP" if fsdp else "DistributedDataParallel")
    # A gradient is a sum over the step's tokens, prompts included, in another order.
    rounding = EPS * expected["steps"][0]["num_tokens"]
    assert len(found["steps"]) == len(expected["steps"]) == STEPS
    for own, other in zip(found["steps"], expected["steps"], strict=True):
        for name in ("loss", "grad_norm", "perception/score", "perception/kept", "reward", "num_tokens"):
            assert own[name] == pytest.approx(other[name], rel=rounding, abs=rounding), name
        assert other["grad_norm"] > 0 and other["perception/score"] > 0
    assert found["kept"] == expected["kept"] and len(found["kept"]) == STEPS * 16
    assert 0.3 < sum(map(sum, found["kept"].values())) / sum(map(len, found["kept"].values())) < 0.7
    start = dict(new_policy(tied).model.named_parameters())
    assert found["weights"].keys() == expected["weights"].keys() == start.keys()
    for name, other in expected["weights"].items():
        moved = (other - start[name]).abs().max()
        assert moved > 0, f"{name} did not train"
        # Each step rounds the weight besides.
        bound = rounding * moved + STEPS * EPS * other.abs().max()
        assert (found["weights"][name] - other).abs().max() <= bound, name
        assert torch.equal(found["weights"][name], ranks[1][case]["weights"][name]), name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_resumed_training_is_the_uninterrupted_one(mode, ranks):
    for rank in ranks:
        whole, again = rank["resumed", mode].values()
        assert len(whole["steps"]) == len(again["steps"]) == STEPS
        for own, other in zip(again["steps"], whole["steps"], strict=True):
            assert {k: v for k, v in own.items() if k != "step_time"} == {
                k: v for k, v in other.items() if k != "step_time"
            }
        for name, weight in whole["weights"].items():
            assert torch.equal(again["weights"][name], weight), name


def test_the_fused_head_refuses_a_head_whose_gradient_would_not_be_summed(ranks):
    for rank in ranks:
        assert "full_tensor()" in rank["refusal"] and "unshard_head(trainer.model)" in rank["refusal"]
