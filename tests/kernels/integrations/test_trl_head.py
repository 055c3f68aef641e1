"""TRL's head and ours in its place: same results and gradients, zero rows free, unknown releases refused."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

pytest.importorskip("trl", reason="TRL is not installed: pip install 'mmrpt[trl]'")

from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer import utils  # noqa: E402

from mmrpt_kernels.integrations import guards, trl  # noqa: E402
from mmrpt_kernels.integrations.guards import SelfCheckError, UnsupportedError  # noqa: E402
from mmrpt_kernels.logprobs import LogProbs  # noqa: E402
from mmrpt_kernels.testing import assert_close_to_truth  # noqa: E402

NAMES = ("logps", *trl.OUTPUTS)


@pytest.fixture(autouse=True)
def head_of_trl():
    yield
    utils._ChunkedLogProbFunction = ChunkedLogProbFunction


def inputs(rows: int, vocab: int, *, bias: bool, dtype=torch.float32, scale: float = 3.0, width: int = 24):
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * scale / width**0.5).to(dtype).requires_grad_()
    return (
        hidden,
        weight,
        torch.randn(vocab).to(dtype).requires_grad_() if bias else None,
        torch.randint(vocab, (rows,)),
    )


def run(head, tensors, options, outputs=trl.OUTPUTS):
    """Results, and gradients of a loss that weighs log-probs and entropies."""
    hidden, weight, bias, targets = tensors
    results = head.apply(hidden, weight, bias, targets, *options, outputs)
    loss = (results[0] * torch.linspace(-1, 1, len(targets))).sum()
    if results[1] is not None:
        loss = loss + 0.3 * results[1].square().sum()
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return results, torch.autograd.grad(loss, leaves) if leaves else ()


# (temperature, TRL's chunk size, soft cap, logit scale)
OPTIONS = {
    "plain": (1.0, 32768, None, 1.0),
    "temperature": (0.7, 5, None, 1.0),
    "all": (1.3, 16, 5.0, 0.4),
    "negative scale": (1.0, 32768, None, -0.5),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"),
    [(1, 7, torch.float32), (13, 131, torch.float32), (300, 37, torch.float32), (40, 501, torch.bfloat16)],
)
def test_results_and_gradients_are_those_of_trl(rows, vocab, dtype, options, bias):
    tensors = inputs(rows, vocab, bias=bias, dtype=dtype)
    wide = [t.detach().double().requires_grad_() if i < 3 and t is not None else t for i, t in enumerate(tensors)]
    with trl.fused_head():
        ours, our_grads = run(utils._ChunkedLogProbFunction, tensors, options)
    theirs, their_grads = run(ChunkedLogProbFunction, tensors, options)
    truth, true_grads = run(trl._make_head(False, "reference"), wide, options)
    # Sums of logits of size 10 cancel in the log-probability: in float32 their rounding is allowed for by `floor`.
    floor = 10.0 if dtype == torch.float32 else 0.0
    for name, own, other, true in zip(NAMES, ours, theirs, truth, strict=True):
        if name == "is_top1":
            assert own.dtype == torch.bool and (floor == 0.0 or torch.equal(own, other))
            continue
        assert own.dtype == torch.float32 and own.requires_grad == (name in ("logps", "entropy"))
        assert not true.isnan().any()
        assert_close_to_truth(own, other, true, name=name, dtype=dtype, floor=floor)
    for own, other, true in zip(our_grads, their_grads, true_grads, strict=True):
        assert own.dtype == dtype
        assert_close_to_truth(own, other, true, name="gradient", dtype=dtype, floor=rows * floor / 10.0)


@pytest.mark.parametrize("outputs", [(), ("log_probs",), ("entropy",), ("log_probs", "mean_logits"), ("is_top1",)])
def test_only_what_is_asked_for_is_returned(outputs):
    tensors = inputs(6, 11, bias=False)
    with trl.fused_head():
        ours, _ = run(utils._ChunkedLogProbFunction, tensors, OPTIONS["all"], outputs)
    assert [name for name, result in zip(NAMES, ours, strict=True) if result is not None] == [
        "logps",
        *(name for name in trl.OUTPUTS if name in outputs),
    ]


def test_under_autocast_the_head_runs_in_its_dtype():
    tensors = inputs(9, 61, bias=True)
    with trl.fused_head(), torch.autocast("cpu", torch.bfloat16):
        ours, grads = run(utils._ChunkedLogProbFunction, tensors, OPTIONS["plain"])
    cast = [t.detach().bfloat16().requires_grad_() for t in tensors[:3]]
    expected, _ = run(trl._make_head(False, None), [*cast, tensors[3]], OPTIONS["plain"])
    for name, own, other in zip(NAMES, ours, expected, strict=True):
        torch.testing.assert_close(own, other, msg=name)
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_no_rows_give_no_rows_and_a_loss_that_still_reaches_the_weights():
    tensors = inputs(0, 11, bias=True)
    with trl.fused_head():
        results, grads = run(utils._ChunkedLogProbFunction, tensors, OPTIONS["all"])
    assert all(result.shape == (0,) for result in results)
    assert [grad.shape for grad in grads] == [t.shape for t in tensors[:3]] and not any(g.any() for g in grads)


def test_the_first_of_equal_logits_is_the_first():
    """Without a clear winner, where the shortcut does not decide, and in a tie."""
    weight = torch.zeros(4, 2)
    hidden, targets = torch.ones(4, 2), torch.arange(4)
    with trl.fused_head():
        results = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8, None, 1.0, ("is_top1",))
    assert results[4].tolist() == [True, False, False, False]


def test_rows_without_gradient_cost_nothing(products):
    """Three rows have a gradient: the backward multiplies those three, and makes no logits again."""
    hidden, weight, _, targets = inputs(50, 17, bias=False)
    hidden.data[3] = float("nan")  # its gradient is zero: nothing of it may reach the weights
    with trl.fused_head(self_check=False):
        products()
        head = utils._ChunkedLogProbFunction
        logps, entropy, *_ = head.apply(hidden, weight, None, targets, 1.0, 8, None, 1.0, ("entropy",))
        entropy.mean().item()  # logged, as trainers do
        assert products() == (50, 0, 0)
        advantages = torch.zeros(50)
        advantages[[7, 20, 21]] = torch.tensor([1.0, -2.0, 0.5])
        (logps * advantages).sum().backward()
    assert products() == (0, 3, 3)
    assert hidden.grad.isfinite().all() and hidden.grad.any(-1).nonzero().flatten().tolist() == [7, 20, 21]
    assert weight.grad.isfinite().all()


# ---- replacing and refusing ----


def test_enable_and_disable():
    before = utils._ChunkedLogProbFunction
    trl.enable_fused_head()
    trl.enable_fused_head()
    assert isinstance(utils._ChunkedLogProbFunction, trl.Head)
    trl.disable_fused_head()
    assert utils._ChunkedLogProbFunction is before is ChunkedLogProbFunction


def test_the_block_restores_what_it_found_also_after_an_error():
    trl.enable_fused_head()
    outer = utils._ChunkedLogProbFunction
    with pytest.raises(ZeroDivisionError), trl.fused_head():
        assert utils._ChunkedLogProbFunction is not outer
        raise ZeroDivisionError
    assert utils._ChunkedLogProbFunction is outer


def installed(version: str | None):
    def found(name: str) -> str:
        if version is None:
            raise guards.importlib.metadata.PackageNotFoundError(name)
        return version

    return guards.importlib.metadata, "version", found


ORIGINAL = ChunkedLogProbFunction.forward


def other_meaning(ctx, hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
    """The same signature, but the temperature acts before the soft cap."""
    return ORIGINAL(ctx, hidden, weight, bias, targets, 1.0, chunk_size, softcap, scale / temperature, outputs)


other_meaning.__signature__ = inspect.signature(ORIGINAL)
# What is replaced by what, and what is said then.
UNKNOWN = [(installed(v), f"trl: got {v}, expected >=1.16,<2") for v in ("1.15.3", "2.0.0", "2.0.0.dev0", "0.27")]
UNKNOWN += [
    (installed(None), "trl: not installed.*pip install"),
    (
        (ChunkedLogProbFunction, "forward", staticmethod(lambda ctx, hidden, weight, targets: None)),
        r"takes \(ctx, hidden, weight, targets\), expected \(ctx, hidden",
    ),
    ((utils, "add_fused_lm_head", lambda model: None), "no longer calls"),
    (
        (ChunkedLogProbFunction, "forward", staticmethod(other_meaning)),
        "gives log-probs .* on a tiny case, expected",
    ),
]


@pytest.mark.parametrize(("replaced", "words"), UNKNOWN, ids=lambda value: value if isinstance(value, str) else "")
def test_an_unknown_release_is_refused(monkeypatch, replaced, words):
    monkeypatch.setattr(*replaced)
    with pytest.raises(UnsupportedError, match=words):
        trl.enable_fused_head()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_an_unknown_output_is_refused():
    with trl.fused_head(), pytest.raises(UnsupportedError, match="got \\['top_k'\\]"):
        run(utils._ChunkedLogProbFunction, inputs(3, 5, bias=False), OPTIONS["plain"], ("entropy", "top_k"))


def test_a_sharded_head_is_refused():
    hidden, weight, _, targets = inputs(3, 5, bias=False)
    weight.ds_id = 0  # how DeepSpeed marks the parameters of ZeRO-3
    with trl.fused_head(), pytest.raises(UnsupportedError, match="ZeRO-3"):
        run(utils._ChunkedLogProbFunction, (hidden, weight, None, targets), OPTIONS["plain"])


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_head_gathered_from_shards_is_refused_where_it_learns(mesh):
    """TRL's way to read a DTensor: its gradient would be each rank's own."""
    hidden, weight, _, targets = inputs(6, 8, bias=False)
    scattered = distribute_tensor(weight.detach(), mesh, [Shard(0)])
    learning = scattered.clone().requires_grad_().full_tensor()
    with trl.fused_head():
        for gathered in (learning, learning.float() * 1.0):
            with pytest.raises(UnsupportedError, match=r"full_tensor\(\).*unshard_head\(trainer.model\)"):
                run(utils._ChunkedLogProbFunction, (hidden, gathered, None, targets), OPTIONS["plain"])
        frozen = (hidden, scattered.full_tensor(), None, targets)
        plain = (hidden, weight * 1.0, None, targets)  # computed from a parameter: its gradient is right
        for tensors in (frozen, plain):
            results, _ = run(utils._ChunkedLogProbFunction, tensors, OPTIONS["plain"])
            torch.testing.assert_close(results[0], run(ChunkedLogProbFunction, tensors, OPTIONS["plain"])[0][0])


class UncalledHead(torch.nn.Module):
    """A model whose head is read in its forward pass and never called, as TRL does it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.lm_head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 8, bias=False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.body(rows), self.lm_head.weight


def test_unshard_head_gathers_a_head_that_is_never_called(mesh):
    plain, model = UncalledHead(), UncalledHead()
    model.load_state_dict(plain.state_dict())
    for part in (model.body, model.lm_head, model):
        fully_shard(part, mesh=mesh)
    rows = torch.randn(3, 4)
    assert isinstance(model(rows)[1], DTensor)
    for either in (model, plain):  # without FSDP2 nothing happens
        trl.unshard_head(either)
        hidden, weight = either(rows)
        assert type(weight) is torch.nn.Parameter and weight.is_leaf
        (hidden @ weight.T).square().sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad.full_tensor(), plain.lm_head.weight.grad)


# ---- the self-check on the first batch ----


@pytest.mark.parametrize(
    ("break_it", "law"),
    [
        (lambda found: LogProbs(found.logps + 20.0, found.entropy), "above 0"),
        (lambda found: LogProbs(found.logps, found.entropy - 20.0), "below 0"),
        (lambda found: LogProbs(found.logps.roll(1), found.entropy), "log-probability: max error"),
        (lambda found: LogProbs(found.logps, found.entropy * 0.9), "entropy: max error"),
        (lambda found: LogProbs(found.logps * torch.nan, found.entropy), "log-probability: actual has NaN"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_batch_is_checked(monkeypatch, break_it, law, dtype):
    tensors = inputs(20, 53, bias=True, dtype=dtype)
    true = trl.linear_logprobs
    trl.enable_fused_head()
    head = utils._ChunkedLogProbFunction
    trl.enable_fused_head(self_check=False)
    unchecked = utils._ChunkedLogProbFunction
    monkeypatch.setattr(trl, "linear_logprobs", lambda *args, **kwargs: break_it(true(*args, **kwargs)))
    with pytest.raises(SelfCheckError, match=law):
        run(head, tensors, OPTIONS["all"])
    run(unchecked, tensors, OPTIONS["all"], ("entropy",))


def test_later_batches_are_not_checked_and_an_unreadable_one_leaves_it_open(monkeypatch):
    hidden, *rest = inputs(5, 53, bias=True)
    trl.enable_fused_head()
    head, true = utils._ChunkedLogProbFunction, trl.linear_logprobs
    refused = pytest.raises(SelfCheckError)

    def wrong(*args, **kwargs) -> LogProbs:
        found = true(*args, **kwargs)
        return found._replace(logps=found.logps - 1.0)

    unreadable, fine = torch.full_like(hidden, torch.nan), contextlib.nullcontext()
    for rows, logprobs, outcome in (
        (unreadable, true, fine), (hidden, wrong, refused), (hidden, true, fine), (hidden, wrong, fine),
    ):  # fmt: skip
        monkeypatch.setattr(trl, "linear_logprobs", logprobs)
        with outcome:
            run(head, (rows, *rest), OPTIONS["plain"], ("entropy",))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("scale", [0.01, 3.0, 300.0, 3000.0])
def test_the_self_check_raises_no_false_alarm(options, scale):
    """Peaked and flat rows, many draws: an alarm would end somebody's training."""
    for _ in range(25):
        with trl.fused_head():
            tensors = inputs(16, 301, bias=True, scale=scale)
            utils._ChunkedLogProbFunction.apply(*tensors, *options, ("entropy",))
