"""DTensor lm heads on 2 processes: `fully_shard`'s gradients, and tensor-parallel meshes as parts of the vocabulary."""

from __future__ import annotations

import datetime
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from mmrpt_kernels.lm_head import vocab_parallel
from mmrpt_kernels.testing import HeadCase
from tests.kernels.lm_head.operators import DIVERGENCE, DOUBLE, OPERATORS, Operator, assert_same, draw, mixed_sum, run

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

WORLD = 2
TIMEOUT = datetime.timedelta(seconds=150)  # what would deadlock raises
CASE = HeadCase("shards", 10, 6, 23, bias=True, ignored="none")  # an odd vocabulary: uneven parts
CALLED = {o.name: o for o in OPERATORS if o.name in ("logprobs", "token_loss", "policy_loss", "divergence")}
MESHES = {
    "tp": ((2,), ("tp",)),
    "unnamed": ((2,), None),
    "dp_tp": ((1, 2), ("dp", "tp")),
    "dp_tp_2_1": ((2, 1), ("dp", "tp")),
    "replicated": ((2, 1), ("dp_replicate", "dp_shard")),
}


def inputs() -> dict:
    return draw(CASE, 7, device="cpu")


def loss_of(operator: Operator, hidden, weight, bias, targets, **options) -> torch.Tensor:
    """Of two views by two heads that are one tensor, where the operator takes two."""
    made = inputs() | {"hidden": hidden, "hidden_q": hidden.roll(1, 0), "weight": weight, "bias": bias}
    made |= {"weight_q": weight}
    return mixed_sum(operator.call(made | {"targets": targets}, **options), 0)


class Model(nn.Module):
    """A trunk and an lm head; `inside` computes the loss in `forward`, where its FSDP group's weights are whole."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(CASE.vocab, CASE.hidden, dtype=DOUBLE)
        self.trunk = nn.Linear(CASE.hidden, CASE.hidden, dtype=DOUBLE)
        self.lm_head = nn.Linear(CASE.hidden, CASE.vocab, dtype=DOUBLE)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, inside=None) -> torch.Tensor:
        hidden = self.trunk(self.embed(ids)).tanh()
        return hidden if inside is None else inside(hidden, self.lm_head.weight, self.lm_head.bias, ids.flip(0))


def batch(rank: int) -> torch.Tensor:
    return torch.randint(CASE.vocab, (CASE.rows,), generator=torch.Generator().manual_seed(rank))


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


def fsdp_expected(operator: Operator, tied: bool) -> dict:
    """What one process with both ranks' batches finds: the mean over ranks."""
    model = Model(tied)
    for step in range(2):
        for rank in range(WORLD):
            loss = functools.partial(loss_of, operator, backend="reference")
            (model(batch(rank + 10 * step), loss) / WORLD).backward()
    return gradients(model)


FSDP = {
    f"{name}_{kind}{'_tied' * tied}": (kind, tied, operator)
    for name, operator in CALLED.items()
    for kind in ("inside_group", "inside_apart", "outside_kept", "outside_group", "outside_apart", "outside_hybrid")
    for tied in (False, True)
    if not (tied and kind.endswith("apart"))  # a tied weight belongs to one FSDP group
}


def tensor_parallel(mesh_name: str, cuts: str, operator: Operator, meshes: dict, group: bool = False) -> dict:
    """Results and gradients of a head on a mesh whose ranks see the same tokens, and how many merges it took. cuts: for
    each dimension of the mesh whether it cuts the vocabulary."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, made = meshes[mesh_name], inputs()
    placed = [Shard(0) if cut == "S" else Replicate() for cut in cuts]
    made |= {n: distribute_tensor(made[n].detach(), mesh, placed).requires_grad_() for n in ("weight", "bias")}
    options = {"vocab_group": mesh.get_group(mesh.ndim - 1)} if group else {}
    made["weight_q"] = made["weight"]
    merges, gather = [], vocab_parallel.Shard.gather
    vocab_parallel.Shard.gather = lambda self, own: (merges.append(1), gather(self, own))[1]
    found = run(operator, made, **options)
    vocab_parallel.Shard.gather = gather
    for name in ("weight", "bias"):
        assert found[f"d_{name}"].placements == made[name].placements
        found[f"d_{name}"] = found[f"d_{name}"].full_tensor()
    return found | {"merges": torch.tensor(len(merges))}


# The mesh, what of it cuts the vocabulary, whether a group is given, and whether the parts are merged or gathered.
PLACES = {
    "by_name": ("tp", "S", False, True),
    "by_group": ("unnamed", "S", True, True),
    "gathered": ("unnamed", "S", False, False),
    "replicated": ("tp", "R", False, False),
    "beside_replicas": ("dp_tp", "RS", False, True),
    "behind_parts": ("dp_tp", "SS", False, True),
    "two_by_one": ("dp_tp_2_1", "SS", False, True),
}
PARALLEL = {f"{o.name}_{place}": (o, *PLACES[place]) for o in CALLED.values() for place in PLACES}


def compiled(meshes: dict, mesh: str) -> dict:
    torch._dynamo.reset()
    operator = CALLED["policy_loss"]
    call = torch.compile(operator.call, fullgraph=True, backend="aot_eager")
    return tensor_parallel(mesh, "S", operator._replace(call=call), meshes)


def refusals(meshes: dict) -> dict[str, str]:
    """What is said, by words that it should have."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    made, mesh = inputs(), meshes["tp"]
    spread, replicated = (distribute_tensor(made["weight"].detach(), mesh, [p]) for p in (Shard(0), Replicate()))
    hidden, targets = (distribute_tensor(made[name].detach(), mesh, [Replicate()]) for name in ("hidden", "targets"))
    logprobs, alone = CALLED["logprobs"], meshes["dp_tp"].get_group(0)
    calls = {
        "weight_q: got a head cut over the vocabulary": (DIVERGENCE, {"weight_q": spread}, {}),
        "(mesh ('tp',), placements (Replicate(),))": (DIVERGENCE, {"weight": spread, "weight_q": replicated}, {}),
        "hidden: got a DTensor": (logprobs, {"hidden": hidden}, {}),
        "targets: got a DTensor": (logprobs, {"targets": targets}, {}),
        "cuts no vocabulary": (logprobs, {"weight": replicated}, {"vocab_group": mesh.get_group()}),
        "get_group(<dimension>)": (logprobs, {"weight": spread}, {"vocab_group": alone}),
    }
    said = {}
    for words, (operator, changes, options) in calls.items():
        try:
            operator.call(made | {"bias": None} | changes, **options)
        except ValueError as error:
            said[words] = str(error)
    return {words: said.get(words, "no error") for words in calls}


def rank_main(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=TIMEOUT)
    torch.set_num_threads(1)
    meshes = {name: init_device_mesh("cpu", shape, mesh_dim_names=names) for name, (shape, names) in MESHES.items()}
    found = {n: fsdp(kind, tied, functools.partial(loss_of, o), meshes) for n, (kind, tied, o) in FSDP.items()}
    for name, (operator, mesh, cuts, group, _) in PARALLEL.items():
        found[name] = tensor_parallel(mesh, cuts, operator, meshes, group)
    found |= {f"compiled_{mesh}": compiled(meshes, mesh) for mesh in ("tp", "unnamed")}
    found["refusals"] = refusals(meshes)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", FSDP)
def test_gradients_are_fully_shards(name, ranks):
    _, tied, operator = FSDP[name]
    for rank in ranks:
        assert_same(rank[name], fsdp_expected(operator, tied), rtol=1e-12, atol=1e-12)


COMPILED = {f"compiled_{mesh}": (CALLED["policy_loss"], mesh == "tp") for mesh in ("tp", "unnamed")}


@pytest.mark.parametrize("name", (*PARALLEL, *COMPILED))
def test_a_mesh_whose_ranks_see_the_same_tokens(name, ranks):
    """Compiled without a graph break too."""
    operator, *_, merged = (PARALLEL | COMPILED)[name]
    made = inputs()
    expected = run(operator, made | {"weight_q": made["weight"]}, backend="reference")
    for rank in ranks:
        found = dict(rank[name])
        assert (found.pop("merges") > 0) == merged
        assert_same(found, expected, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_meant_is_refused(ranks):
    for rank in ranks:
        for words, message in rank["refusals"].items():
            assert words in message, (words, message)
