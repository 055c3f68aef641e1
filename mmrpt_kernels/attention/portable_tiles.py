"""Two ways to do attention with mass of one tile, forward and backward.

CpuFlashTiles calls torch's fused CPU attention. The key weights stand as extra columns of v, so the mass of every row
comes out of the same pass as extra columns of the output:  P @ [v | w] = [out | mass].
PlainTiles is softmax(q k^T) in plain PyTorch, for what the fused kernel lacks (soft cap, other devices).
Both work in float32 (float64 for float64 inputs) and take (B, T, H, D) tensors. Gradients, from the saved lse:

    P = exp(s - lse),  dP = dout v^T + dmass w^T,  delta = rowsum(dout * out) + rowsum(dmass * mass) - dlse
    dS = P * (dP - delta),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout,  dw = sum over heads of P^T dmass
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Tile

FLASH_AVAILABLE = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


class RowGradients(NamedTuple):
    """What the backward pass knows of every row; None = no gradient arrived."""

    dout: torch.Tensor | None  # (B, T, Hq, Dv)
    dmass: torch.Tensor | None  # (B, Hq, T, G)
    dlse: torch.Tensor | None  # (B, Hq, T)
    out: torch.Tensor | None  # (B, T, Hq, Dv); None where dout is
    mass: torch.Tensor | None  # (B, Hq, T, G)
    lse: torch.Tensor  # (B, Hq, T), -inf in rows that attend to nothing

    def without_dead_rows(self, dtype: torch.dtype) -> RowGradients:
        """All in `dtype`; rows without keys have no gradient and lse +inf, so that exp(s - lse) is 0 there."""
        dead = self.lse == -torch.inf  # (B, Hq, T)
        return RowGradients(
            None if self.dout is None else self.dout.to(dtype).masked_fill(dead.transpose(1, 2)[..., None], 0.0),
            None if self.dmass is None else self.dmass.to(dtype).masked_fill(dead[..., None], 0.0),
            None if self.dlse is None else self.dlse.to(dtype).masked_fill(dead, 0.0),
            None if self.dout is None else self.out.to(dtype),
            self.mass,
            self.lse.to(dtype).masked_fill(dead, torch.inf),
        )


class Gradients(NamedTuple):
    """Accumulators, shaped as q, k, v, w; w None where its gradient is not wanted."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    w: torch.Tensor | None


class TileAttention(Protocol):
    """allowed: `masks.tile_allowed` of the tile."""

    def forward(self, tile: Tile, allowed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """out (B, rows, Hq, Dv), mass (B, Hq, rows, G), lse (B, Hq, rows); dead rows hold anything."""
        ...

    def backward(self, tile: Tile, allowed: torch.Tensor | None, rows: RowGradients, into: Gradients) -> None:
        """Add the tile's part to `into`."""
        ...


def _columns(parts: list[tuple[torch.Tensor | float, int]], like: torch.Tensor, width: int) -> torch.Tensor:
    """(B, heads, N, width): parts (tensors (B, heads, N, columns) or a constant) side by side, zeros after them.

    Laid out as (B, N, heads, width), the layout of the inputs.
    """
    batch, heads, num, _ = like.shape
    # Weights have one head for all: as they are, the kernel would read past their end.
    if len(parts) == 1 and isinstance(parts[0][0], torch.Tensor) and parts[0][0].shape == (batch, heads, num, width):
        return parts[0][0]
    made = like.new_empty((batch, num, heads, width)).transpose(1, 2)
    start = 0
    for part, columns in parts:
        made[..., start : start + columns] = part
        start += columns
    made[..., start:] = 0.0
    return made


class CpuFlashTiles:
    """torch's fused CPU attention on [v | w]; a head of the kernel is max(D, Dv + G) wide. GQA without copies."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor, options: AttentionOptions):
        """q (B, T, Hq, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv), w (B, S, G), all of one dtype."""
        self.q, self.k, self.v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        self.w = w[:, None]
        self.scale = options.scale
        self.dim, self.dim_v, self.groups = q.shape[-1], v.shape[-1], w.shape[-1]
        self._padded: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def _bias(self, allowed: torch.Tensor | None) -> torch.Tensor | None:
        if allowed is None:
            return None
        return torch.zeros(allowed.shape, dtype=self.q.dtype).masked_fill_(~allowed, -torch.inf)

    def _inputs(self, value_parts: list[tuple[torch.Tensor | float, int]]) -> tuple[torch.Tensor, ...]:
        """q, k and the value parts at one common width; made once, whatever the number of tiles."""
        if self._padded is None:
            width = max(self.dim, sum(columns for _, columns in value_parts))
            self._padded = (
                _columns([(self.q, self.dim)], self.q, width),
                _columns([(self.k, self.dim)], self.k, width),
                _columns(value_parts, self.v, width),
            )
        return self._padded

    def forward(self, tile: Tile, allowed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self._inputs([(self.v, self.dim_v), (self.w, self.groups)])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, tile.rows],
            k[:, :, tile.keys],
            v[:, :, tile.keys],
            0.0,
            tile.shape == "causal",
            attn_mask=self._bias(allowed),
            scale=self.scale,
        )
        split = self.dim_v
        return out[..., :split].transpose(1, 2), out[..., split : split + self.groups], lse

    def backward(self, tile: Tile, allowed: torch.Tensor | None, rows: RowGradients, into: Gradients) -> None:
        value_parts: list[tuple[torch.Tensor | float, int]] = []
        grad_parts, out_parts = [], []
        if rows.dout is not None:
            value_parts.append((self.v, self.dim_v))
            grad_parts.append((rows.dout[:, tile.rows].transpose(1, 2), self.dim_v))
            out_parts.append((rows.out[:, tile.rows].transpose(1, 2), self.dim_v))
        if rows.dmass is not None:
            value_parts.append((self.w, self.groups))
            grad_parts.append((rows.dmass[:, :, tile.rows], self.groups))
            out_parts.append((rows.mass[:, :, tile.rows], self.groups))
        if rows.dlse is not None:
            # A column of ones adds dlse to dP; its output is written as 0, not 1, so that delta does not take it back.
            value_parts.append((1.0, 1))
            grad_parts.append((rows.dlse[:, :, tile.rows, None], 1))
        q, k, v = self._inputs(value_parts)
        q_tile = q[:, :, tile.rows]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _columns(grad_parts, q_tile, q.shape[-1]),
            q_tile,
            k[:, :, tile.keys],
            v[:, :, tile.keys],
            _columns(out_parts, q_tile, q.shape[-1]),
            rows.lse[:, :, tile.rows],
            0.0,
            tile.shape == "causal",
            attn_mask=self._bias(allowed),
            scale=self.scale,
        )
        into.q[:, tile.rows] += dq[..., : self.dim].transpose(1, 2)
        into.k[:, tile.keys] += dk[..., : self.dim].transpose(1, 2)
        start = 0
        if rows.dout is not None:
            into.v[:, tile.keys] += dv[..., : self.dim_v].transpose(1, 2)
            start = self.dim_v
        if rows.dmass is not None and into.w is not None:
            into.w[:, tile.keys] += dv[..., start : start + self.groups].sum(1)


class PlainTiles:
    """softmax(q k^T) of a tile in plain PyTorch; heads that share a key head are stacked as rows of one product."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor, options: AttentionOptions):
        """q (B, T, Hq, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv), w (B, S, G), all of one dtype."""
        self.q, self.w = q, w[:, None]
        self.k, self.v = k.transpose(1, 2), v.transpose(1, 2)
        self.options = options
        self.heads_kv = k.shape[2]
        self.repeat = q.shape[2] // k.shape[2]

    def _stack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, rows, Hq, E) -> (B, Hkv, repeat * rows, E)."""
        batch, rows, _, last = x.shape
        x = x.reshape(batch, rows, self.heads_kv, self.repeat, last)
        return x.permute(0, 2, 3, 1, 4).reshape(batch, self.heads_kv, self.repeat * rows, last)

    def _stack_heads_first(self, x: torch.Tensor) -> torch.Tensor:
        """(B, Hq, rows, E) -> (B, Hkv, repeat * rows, E)."""
        return x.reshape(x.shape[0], self.heads_kv, self.repeat * x.shape[2], x.shape[3])

    def _heads_first(self, x: torch.Tensor) -> torch.Tensor:
        """(B, Hkv, repeat * rows, E) -> (B, Hq, rows, E)."""
        batch, heads_kv, stacked, last = x.shape
        return x.reshape(batch, heads_kv * self.repeat, stacked // self.repeat, last)

    def _scores(
        self, tile: Tile, allowed: torch.Tensor | None, slope: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Scaled q rows, masked scores (B, Hkv, repeat * rows, keys) and, with `slope`, d capped / d raw score."""
        q = self._stack(self.q[:, tile.rows] * self.options.scale)
        scores = q @ self.k[:, :, tile.keys].mT
        derivative = None
        if self.options.softcap > 0:
            bent = scores.div_(self.options.softcap).tanh_()
            derivative = 1.0 - bent.square() if slope else None
            scores = bent.mul_(self.options.softcap)
        if allowed is not None:
            by_head = scores.view(*scores.shape[:2], self.repeat, -1, scores.shape[-1])
            by_head.masked_fill_(~allowed[:, :, None], -torch.inf)
        return q, scores, derivative

    def forward(self, tile: Tile, allowed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, scores, _ = self._scores(tile, allowed)
        # The clamp keeps a row of -inf from becoming NaN: its sum is 0 and its lse -inf.
        highest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        probs = scores.sub_(highest).exp_()
        total = probs.sum(-1, keepdim=True)
        lse = self._heads_first(highest + total.log())[..., 0]
        total.masked_fill_(total == 0, 1.0)
        out = self._heads_first((probs @ self.v[:, :, tile.keys]) / total).transpose(1, 2)
        mass = self._heads_first((probs @ self.w[:, :, tile.keys]) / total)
        return out, mass, lse

    def backward(self, tile: Tile, allowed: torch.Tensor | None, rows: RowGradients, into: Gradients) -> None:
        q, scores, slope = self._scores(tile, allowed, slope=True)
        probs = scores.sub_(self._stack_heads_first(rows.lse[:, :, tile.rows, None])).exp_()
        dscores, delta = None, 0.0
        if rows.dout is not None:
            dout = self._stack(rows.dout[:, tile.rows])
            into.v[:, tile.keys] += (probs.mT @ dout).transpose(1, 2)
            dscores = dout @ self.v[:, :, tile.keys].mT
            delta = (dout * self._stack(rows.out[:, tile.rows])).sum(-1, keepdim=True)
        if rows.dmass is not None:
            dmass = self._stack_heads_first(rows.dmass[:, :, tile.rows])
            if into.w is not None:
                into.w[:, tile.keys] += (probs.mT @ dmass).sum(1)
            from_mass = dmass @ self.w[:, :, tile.keys].mT
            dscores = from_mass if dscores is None else dscores.add_(from_mass)
            delta = delta + (dmass * self._stack_heads_first(rows.mass[:, :, tile.rows])).sum(-1, keepdim=True)
        if rows.dlse is not None:
            delta = delta - self._stack_heads_first(rows.dlse[:, :, tile.rows, None])
        dscores = probs * (-delta) if dscores is None else dscores.sub_(delta).mul_(probs)
        if slope is not None:
            dscores.mul_(slope)
        dq = self._heads_first(dscores @ self.k[:, :, tile.keys]) * self.options.scale
        into.q[:, tile.rows] += dq.transpose(1, 2)
        into.k[:, tile.keys] += (dscores.mT @ q).transpose(1, 2)
