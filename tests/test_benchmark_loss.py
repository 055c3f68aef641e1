"""The loss's benchmarks as far as a CPU shows them: runs end to end, the GPU's cases and contenders, the goals."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from benchmarks import bench_divergence as divergence
from benchmarks import bench_logprobs as logprobs
from benchmarks import bench_objective as objective
from benchmarks import bench_policy_loss as policy_loss
from benchmarks import harness, present
from benchmarks.goals import CaseRows
from benchmarks.harness import Case, Contender
from benchmarks.heads import eager, missing
from benchmarks.measure import quartiles
from mmrpt_kernels.testing import HEADS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HEAD = (96, 32, 1031)


def measured(module, case: Case, leave_out: str = "compiled|TRL|Liger") -> CaseRows:
    contenders = [c for c in module.contenders(CPU) if not re.search(leave_out, c.name)]
    rows = harness.compare(case, contenders, CPU, budget=0.1)
    for name, row in rows.items():
        assert row["status"] == "ok" or row["status"].startswith("skipped"), (name, row["status"])
        row |= {"seconds": quartiles(row["samples"])} if "samples" in row else {}
    return CaseRows("op", case.name, case.params, rows)


FULL, HALF = torch.float32, torch.bfloat16
BIAS, TRAINED = {"bias": True}, {"logits": "trained"}


def test_the_policy_loss_end_to_end() -> None:
    cases = [
        policy_loss.case("flat", HEAD, FULL, keep=0.4, **BIAS),
        policy_loss.case("trained", HEAD, FULL, keep=1.0, **TRAINED),
        policy_loss.case("half", HEAD, HALF, keep=0.4, **TRAINED),
        policy_loss.case("frozen", HEAD, FULL, keep=1.0, learn=("hidden",)),
        policy_loss.case("forward", HEAD, FULL, keep=0.4, learn=()),
    ]
    found = {case.name: measured(policy_loss, case) for case in cases}
    rows = {name: case.rows for name, case in found.items()}
    assert set(rows["half"]["portable, skip_below=auto"]["errors"]) == {"value", "d_hidden", "d_weight"}
    assert set(rows["frozen"]["portable"]["errors"]) == {"value", "d_hidden"}
    assert set(rows["forward"]["portable"]["errors"]) == {"value"}
    for case in ("trained", "half"):
        row = rows[case]["portable, skip_below=auto" if case == "half" else "portable, skip_below=2^-8"]
        assert row["seconds"][0] > 0 and row["facts"]["words kept"] < 0.45, case
    assert rows["trained"]["portable, skip_below=2^-8"]["errors"]["d_hidden"] > 1e-5, "said, though float32 does better"
    assert rows["trained"]["portable, skip_below=auto"]["status"] == "skipped: exact for float32 inputs"
    assert rows["forward"]["portable, skip_below=2^-8"]["status"] == "skipped: there is no gradient"
    assert rows["trained"]["eager on gathered rows"]["status"] == "skipped: all tokens are kept"
    judged = {(g["goal"], g["case"]): g["limit"] for g in policy_loss.goals(list(found.values()), "cpu")}
    assert judged["eager's time / portable", "flat"] == ">= 1.7" and len(judged) == 5
    assert judged["eager's time / portable", "trained"] == judged["eager's time / portable", "frozen"] == ">= 1"
    assert judged["eager's time / portable, skip_below=auto", "half"] == ">= 1.7"


def test_log_probs_end_to_end_and_their_precision() -> None:
    score = measured(logprobs, logprobs.case("score", HEAD, HALF, **BIAS))
    train = measured(logprobs, logprobs.case("train", HEAD, HALF, keep=0.4, **TRAINED))
    (goal,) = logprobs.goals([score, train], "cpu")
    assert goal["goal"] == "largest error of a log-probability, portable" and goal["case"] == "score" and goal["met"]
    assert 0 < goal["measured"] <= 1e-5 and goal["limit"] == "<= 1e-05"
    assert train.rows["linear_token_loss, skip_below=auto"]["facts"]["words kept"] < 0.45


@pytest.mark.parametrize("learn", [(), ("hidden_p", "weight"), ("hidden_p", "hidden_q", "weight")])
def test_divergences_end_to_end(learn: tuple[str, ...]) -> None:
    case = measured(divergence, divergence.case("c", HEAD, FULL, learn=learn, **BIAS))
    assert set(case.rows["portable"]["errors"]) >= {"divergence", *(f"d_{name}" for name in learn)}


def trl_and_eager(module, case: Case) -> dict[str, dict]:
    return measured(module, case, leave_out="^(?!TRL|eager$)").rows


@pytest.mark.skipif(missing("trl.kernels.chunked_divergence") is not None, reason="TRL 1.16 is not installed")
def test_trls_heads_compute_what_is_compared() -> None:
    """A contender that computed something else would be marked inaccurate, and so would a bias that was dropped."""
    assert trl_and_eager(policy_loss, policy_loss.case("c", HEAD, FULL, keep=0.4, **BIAS))["TRL"]["status"] == "ok"
    assert trl_and_eager(logprobs, logprobs.case("c", HEAD, FULL, **BIAS))["TRL"]["status"] == "ok"
    for learn, kind in (((), "kl"), (divergence.FIRST, "kl"), (divergence.FIRST, "js")):
        case = divergence.case("c", HEAD, FULL, learn=learn, kind=kind, **BIAS)
        row = trl_and_eager(divergence, case)["TRL"]
        compared = {"d_hidden_p", "d_weight"} if learn else {"entropy_p"}
        assert row["status"] == "ok" and set(row["errors"]) == {"divergence"} | compared
    both = trl_and_eager(divergence, divergence.case("c", HEAD, FULL, learn=divergence.BOTH))["TRL"]
    assert both["status"].startswith("skipped: TRL's head has one kind at a time and a gradient in the student alone")


@pytest.mark.parametrize("logits", ["flat", "trained"])
def test_the_trainers_path_is_what_eager_writes_out(logits: str) -> None:
    """Perception weights, filter, clips, bias and normaliser: one that differed would be marked inaccurate."""

    def without_bias(hidden, weight, targets, bias, *, entropy):
        return eager(hidden, weight, targets, entropy=entropy)

    case = objective.case("c", (24, 24), HEAD[1:], FULL, logits=logits)
    wrong = Contender("wrong", objective.step(partial(objective.from_logps, without_bias)))
    contenders = [c for c in objective.contenders(CPU) if c.name in ("eager", "bare products", "trainer")]
    rows = harness.compare(case, [*contenders, wrong], CPU, budget=0.1)
    assert rows["trainer"]["status"] == "ok" and rows["trainer"]["speedup"]
    assert set(rows["trainer"]["errors"]) == {"value", "d_hidden", "d_weight"}
    assert rows["wrong"]["status"].startswith("inaccurate")


def test_the_gpus_cases_have_every_shape_asked_for_and_the_goals_first() -> None:
    for module in (policy_loss, logprobs, divergence):
        cases = module.cases(GPU)
        params = [case.params for case in cases]
        assert {p["H"] for p in params} == {2048, 3584, 5120}, module.__name__
        assert {p["V"] for p in params} == {128_256, 151_936, 152_064}
        assert {p["N"] for p in params} >= {4096, 8192, 65_536}
        assert all(p["dtype"] == "bfloat16" for p in params)
        quick = [case.quick for case in cases]
        assert quick == sorted(quick, reverse=True), "a spent budget leaves out what comes last"
    cases = {case.name: case.params for case in policy_loss.cases(GPU)}
    assert {p["keep"] for p in cases.values()} == {0.2, 0.4, 1.0}
    assert {tuple(p["learn"]) for p in cases.values()} == {(), ("hidden",), ("hidden", "weight")}
    assert {p["logits"] for p in cases.values()} == set(HEADS)
    assert {p["keep"] for p in (case.params for case in logprobs.cases(GPU))} == {None, 0.2, 0.4, 1.0}
    for module in (policy_loss, logprobs, divergence):
        for device in (CPU, GPU):
            assert {case.params["bias"] for case in module.cases(device)} == {False, True}, "the trainer has a bias"


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("module", [policy_loss, logprobs, divergence, objective])
def test_there_is_one_baseline_one_floor_and_a_name_for_each(module, device: torch.device) -> None:
    contenders = module.contenders(device)
    assert len({c.name for c in contenders}) == len(contenders)
    assert [c.kind for c in contenders].count("baseline") == [c.kind for c in contenders].count("floor") == 1
    assert [c.name for c in contenders if c.kind == "ours" and not c.variant], "somebody of ours is in the plots"
    assert any(case.quick for case in module.cases(device))


def test_every_peer_is_named_and_whoever_is_absent_says_why() -> None:
    names = {contender.name for contender in policy_loss.contenders(GPU)}
    peers = {"eager, compiled", "eager, auto-chunked", "TRL", "Liger GRPO", "Liger scaled CE", "verl"}
    assert peers | {"cut-cross-entropy"} <= names
    cut = next(c for c in policy_loss.contenders(CPU) if c.name == "cut-cross-entropy")
    assert cut.skip == "its kernels need a GPU"


def test_inputs_stay_clear_of_the_clip() -> None:
    """No token's log-ratio is within 0.08 of a clip, so rounding decides about none; some are clipped, most are not."""
    case = policy_loss.case("c", (512, 32, 257), torch.float64, keep=0.4)
    inputs = case.make_inputs(torch.device("cpu"))
    logps = eager(inputs["hidden"], inputs["weight"], inputs["targets"], entropy=False).logps
    log_ratio = (logps - inputs["old_logps"]).detach()
    clips = torch.tensor([0.8, 1.2], dtype=torch.float64).log()
    assert (log_ratio[..., None] - clips).abs().min() > 0.08
    assert 0.02 < (log_ratio.abs() > 0.3).double().mean() < 0.1
    assert inputs["perception_mask"].sum(1).tolist() == [26] * 8  # ceil(0.4 * 64)


def row(seconds: float, kind: str = "ours", **more) -> dict:
    return {"kind": kind, "seconds": [seconds] * 3} | more


def test_goals_on_a_gpu() -> None:
    rows = {
        "eager": row(60.0, "baseline", peak_bytes=900),
        "triton": row(12.0, peak_bytes=40, of_floor=[1.2, 1.1, 1.3]),
        "triton, skip_below=auto": row(6.0, peak_bytes=44, of_floor=[0.6] * 3),
        "TRL": row(24.0, "peer", peak_bytes=70),
        "Liger GRPO": row(12.0, "peer", peak_bytes=100),
        "cut-cross-entropy on gathered rows": row(5.0, "peer", peak_bytes=50),
    }
    both = ["hidden", "weight"]
    kinds = (("all", 1.0, both), ("some", 0.4, both), ("frozen", 1.0, ["hidden"]), ("forward", 0.4, []))
    cases = [CaseRows("policy_loss", name, {"keep": keep, "learn": learn}, rows) for name, keep, learn in kinds]
    goals = policy_loss.goals(cases, "cuda")
    found = {(goal["goal"], goal["case"]): goal for goal in goals}

    def judged(goal: str, name: str) -> tuple[float, str, bool]:
        return tuple(found[goal, name][key] for key in ("measured", "limit", "met"))

    assert judged("time / bare products, triton", "all") == (1.2, "<= 1.1", False)
    assert judged("time / bare products, triton", "some") == (1.2, "<= 1.25", True)
    assert judged("time / bare products, triton", "frozen") == (1.2, "<= 1.1", False)
    assert judged("fastest peer's time (Liger GRPO) / triton", "all") == (1.0, ">= 1.3", False)
    assert judged("fastest peer's time (Liger GRPO) / triton, skip_below=auto", "some") == (2.0, ">= 2.4", False)
    assert judged("TRL's time / triton", "all") == (2.0, ">= 1.5", True)
    assert judged("memory / fastest peer's (Liger GRPO), triton", "frozen") == (0.4, "<= 0.5", True)
    assert not any(name == "forward" or "Liger GRPO's" in goal for goal, name in found if name != "all")
    assert re.search(
        r"\| time / bare products, triton +\| some +\| 1.2 +\| <= 1.25 \| yes \|", present.goals_table(goals)
    )


def test_gathered_rows_have_the_same_loss() -> None:
    inputs = policy_loss.case("c", HEAD, torch.float64, keep=0.4).make_inputs(torch.device("cpu"))
    whole, gathered = (
        policy_loss.step(partial(loss, eager))(**inputs)
        for loss in (policy_loss.loss_from_logps, policy_loss.loss_of_gathered)
    )
    for name, value in whole.items():
        torch.testing.assert_close(gathered[name], value, msg=name)
