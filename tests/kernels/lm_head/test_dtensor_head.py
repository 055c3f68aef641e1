"""DTensor lm heads on 2 processes: `fully_shard`'s gradients, and tensor-parallel meshes as parts of the vocabulary."""

from __future__ import annotations

import datetime
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from mmrpt_kernels import linear_logprobs, linear_policy_loss, linear_token_divergence, linear_token_loss
from mmrpt_kernels.lm_head import vocab_parallel

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

D = torch.float64
WORLD = 2
TIMEOUT = datetime.timedelta(seconds=150)  # what would deadlock raises
WORDS, WIDTH, TOKENS = 23, 6, 10  # an odd vocabulary: uneven parts


def by_eager(hidden, weight, bias, targets):
    return F.cross_entropy(F.linear(hidden, weight, bias), targets)


def by_logprobs(hidden, weight, bias, targets, **how):
    return -linear_logprobs(hidden, weight, targets, bias=bias, **how).logps.mean()


def by_token_loss(hidden, weight, bias, targets, **how):
    return linear_token_loss(hidden, weight, targets, lambda lp, _h, _rows: -lp / TOKENS, bias=bias, **how)


def by_policy_loss(hidden, weight, bias, targets, **how):
    """Strictly on-policy with advantage 1: the value is -1, the gradient cross-entropy's."""
    ones = torch.ones(1, TOKENS, dtype=D)
    shaped = (hidden[None], weight, targets[None], ones)
    return linear_policy_loss(*shaped, response_mask=ones.bool(), bias=bias, **how).loss


def by_divergence(hidden, weight, bias, targets, **how):
    """The same view twice, by two heads that are one tensor: half of cross-entropy each."""
    given = {"weight_q": weight, "targets": targets, "bias": bias, "kind": ("js", "kl")}
    out = linear_token_divergence(hidden, hidden, weight, **given, **how)
    return -0.5 * (out.logps_p + out.logps_q).mean() + out.divergence.sum()


LOSSES = {
    "logprobs": by_logprobs,
    "token_loss": by_token_loss,
    "policy_loss": by_policy_loss,
    "divergence": by_divergence,
}


class Model(nn.Module):
    """A trunk and an lm head; `inside` computes the loss in `forward`, where its FSDP group's weights are whole."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(WORDS, WIDTH, dtype=D)
        self.trunk = nn.Linear(WIDTH, WIDTH, dtype=D)
        self.lm_head = nn.Linear(WIDTH, WORDS, dtype=D)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, inside=None) -> torch.Tensor:
        hidden = self.trunk(self.embed(ids)).tanh()
        return hidden if inside is None else inside(hidden, self.lm_head.weight, self.lm_head.bias, ids.flip(0))


def batch(rank: int) -> torch.Tensor:
    return torch.randint(WORDS, (TOKENS,), generator=torch.Generator().manual_seed(rank))


def gradients(model: Model) -> dict[str, torch.Tensor]:
    """Every parameter's gradient, whole; which must lie as its parameter lies."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if hasattr(parameter, "placements"):
            assert grad.placements == parameter.placements and grad.device_mesh == parameter.device_mesh, name
            grad = grad.full_tensor()
        found[name] = grad
    return found


def fsdp(kind: str, tied: bool, loss, meshes: dict) -> dict:
    """Gradients of one step on a batch of its own per rank, twice accumulated."""
    from torch.distributed.fsdp import fully_shard

    model = Model(tied)
    where, how = kind.split("_", 1)
    options = {"mesh": meshes["replicated"]} if how == "hybrid" else {}
    if how == "apart":
        fully_shard(model.lm_head)  # never called, so its weights stay DTensors, inside of forward as outside
    fully_shard(model, reshard_after_forward=how != "kept", **options)
    for step in range(2):
        ids = batch(dist.get_rank() + 10 * step)
        if where == "inside":
            model(ids, loss).backward()
        else:
            hidden = model(ids)
            seen = type(model.lm_head.weight.data).__name__
            assert seen == ("Tensor" if how == "kept" else "DTensor"), seen
            loss(hidden, model.lm_head.weight, model.lm_head.bias, ids.flip(0)).backward()
    return gradients(model)


def fsdp_expected(tied: bool) -> dict:
    """What one process with both ranks' batches finds: the mean over ranks."""
    model = Model(tied)
    for step in range(2):
        for rank in range(WORLD):
            (model(batch(rank + 10 * step), by_eager) / WORLD).backward()
    return gradients(model)


FSDP = {
    f"{name}_{kind}{'_tied' * tied}": (functools.partial(fsdp, kind, tied, loss), tied)
    for name, loss in {"eager": by_eager, **LOSSES}.items()
    for kind in ("inside_group", "inside_apart", "outside_kept", "outside_group", "outside_apart", "outside_hybrid")
    for tied in (False, True)
    if not (tied and kind.endswith("apart"))  # a tied weight belongs to one FSDP group
    and not (name == "eager" and kind != "inside_group")  # eager: fully_shard's own doing, the yardstick
}


def head() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=generator, dtype=D) for shape in ((TOKENS, WIDTH), (WORDS, WIDTH), (WORDS,))]


def tensor_parallel(mesh_name: str, placed, loss, meshes: dict, group: bool = False) -> dict:
    """Loss and gradients of a head on a mesh whose ranks see the same tokens, and how many merges it took."""
    from torch.distributed.tensor import distribute_tensor

    mesh = meshes[mesh_name]
    hidden, weight, bias = head()
    hidden.requires_grad_()
    weight, bias = (distribute_tensor(t, mesh, placed()).requires_grad_() for t in (weight, bias))
    how = {"vocab_group": mesh.get_group(mesh.ndim - 1)} if group else {}
    merges, gather = [], vocab_parallel.Shard.gather
    vocab_parallel.Shard.gather = lambda self, own: (merges.append(1), gather(self, own))[1]
    value = loss(hidden, weight, bias, batch(0), **how)
    value.backward()
    vocab_parallel.Shard.gather = gather
    for tensor in (weight, bias):
        assert tensor.grad.placements == tensor.placements
    found = {"loss": value.detach(), "hidden": hidden.grad, "merges": torch.tensor(len(merges))}
    return found | {"weight": weight.grad.full_tensor(), "bias": bias.grad.full_tensor()}


def cut():
    from torch.distributed.tensor import Shard

    return [Shard(0)]


def whole():
    from torch.distributed.tensor import Replicate

    return [Replicate()]


def cut_last():
    return [*whole(), *cut()]


def cut_both():
    return [*cut(), *cut()]


PARALLEL = {
    f"{loss_name}_{name}": (functools.partial(tensor_parallel, mesh, placed, loss, group=group), merged)
    for loss_name, loss in LOSSES.items()
    for name, (mesh, placed, group, merged) in {
        "by_name": ("tp", cut, False, True),
        "by_group": ("unnamed", cut, True, True),
        "gathered": ("unnamed", cut, False, False),
        "replicated": ("tp", whole, False, False),
        "beside_replicas": ("dp_tp", cut_last, False, True),
        "behind_parts": ("dp_tp", cut_both, False, True),
        "two_by_one": ("dp_tp_2_1", cut_both, False, True),
    }.items()
}


def compiled(meshes: dict) -> dict:
    torch._dynamo.reset()
    return {
        name: tensor_parallel(mesh, cut, torch.compile(by_policy_loss, fullgraph=True, backend="aot_eager"), meshes)
        for name, mesh in (("tp", "tp"), ("unnamed", "unnamed"))
    }


def message_of(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def refusals(meshes: dict) -> dict[str, str]:
    from torch.distributed.tensor import distribute_tensor

    hidden, weight, bias = head()
    mesh = meshes["tp"]
    spread = distribute_tensor(weight, mesh, cut())
    replicated = distribute_tensor(weight, mesh, whole())
    alone = meshes["dp_tp"].get_group(0)

    def two_heads(weight, weight_q):
        return lambda: linear_token_divergence(hidden, hidden, weight, weight_q=weight_q)

    return {
        "weight_q: got a head cut over the vocabulary": message_of(two_heads(weight, spread)),
        "(mesh ('tp',), placements (Replicate(),))": message_of(two_heads(spread, replicated)),
        "hidden: got a DTensor": message_of(
            lambda: by_logprobs(distribute_tensor(hidden, mesh, whole()), weight, bias, batch(0))
        ),
        "targets: got a DTensor": message_of(
            lambda: by_logprobs(hidden, weight, bias, distribute_tensor(batch(0), mesh, whole()))
        ),
        "cuts no vocabulary": message_of(
            lambda: by_logprobs(hidden, replicated, None, batch(0), vocab_group=mesh.get_group())
        ),
        "get_group(<dimension>)": message_of(lambda: by_logprobs(hidden, spread, None, batch(0), vocab_group=alone)),
    }


def rank_main(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=TIMEOUT)
    torch.set_num_threads(1)
    named = {
        "tp": ((2,), ("tp",)),
        "unnamed": ((2,), None),
        "dp_tp": ((1, 2), ("dp", "tp")),
        "dp_tp_2_1": ((2, 1), ("dp", "tp")),
        "replicated": ((2, 1), ("dp_replicate", "dp_shard")),
    }
    meshes = {name: init_device_mesh("cpu", shape, mesh_dim_names=names) for name, (shape, names) in named.items()}
    found = {name: case(meshes=meshes) for name, (case, _) in (FSDP | PARALLEL).items()}
    found["compiled"] = compiled(meshes)
    found["refusals"] = refusals(meshes)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", FSDP)
def test_gradients_are_fully_shards(name, ranks):
    for rank in ranks:
        assert_same(rank[name], fsdp_expected(FSDP[name][1]))


def parallel_expected() -> dict:
    hidden, weight, bias = (t.requires_grad_() for t in head())
    loss = by_eager(hidden, weight, bias, batch(0))
    loss.backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}


@pytest.mark.parametrize("name", PARALLEL)
def test_a_mesh_whose_ranks_see_the_same_tokens(name, ranks):
    for rank in ranks:
        found = dict(rank[name])
        assert (found.pop("merges") > 0) == PARALLEL[name][1]
        if name.startswith("policy_loss"):
            del found["loss"]  # whose value is not cross-entropy's
        assert_same(found, {key: value for key, value in parallel_expected().items() if key in found})


@pytest.mark.parametrize("mesh", ("tp", "unnamed"))
def test_compiles_without_a_graph_break(mesh, ranks):
    for rank in ranks:
        found = dict(rank["compiled"][mesh])
        assert (found.pop("merges") > 0) == (mesh == "tp")
        del found["loss"]
        assert_same(found, {key: value for key, value in parallel_expected().items() if key != "loss"})


def test_what_cannot_be_meant_is_refused(ranks):
    for rank in ranks:
        for part, message in rank["refusals"].items():
            assert part in message, (part, message)
