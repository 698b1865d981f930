"""Pooling by the attention of one query a frame: of CLIP's ResNets, and of SigLIP.

Only keys and values, of which there are many, are computed in bfloat16 under ``--precision bf16``.
"""

from __future__ import annotations

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.attention_pool2d import AttentionPool2d
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from pvrpipe.pipeline.full_precision import full_precision, in_full


def attention_pooled(pool: nn.Module, x: Tensor) -> Tensor:
    """A map (B, C, h, w) or tokens (B, K, D), pooled to (B, D); a pool of another kind does it in its own way."""
    if isinstance(pool, AttentionPool2d) and (pool.qkv, pool.cls_token, pool.pool_type) == (
        None,
        None,
        "token",
    ):
        return _of_map(pool, x)
    if isinstance(pool, AttentionPoolLatent) and _plain(pool):
        return _of_tokens(pool, x)
    pooled: Tensor = pool(x)
    return pooled


def _of_map(pool: AttentionPool2d, x: Tensor) -> Tensor:
    """The query is the mean of the map. timm computes what each place would ask, too, and leaves it aside."""
    size = x.shape[2:]
    x = x.float().flatten(2).transpose(1, 2)
    places = resample_abs_pos_embed(
        pool.pos_embed[None], list(size), old_size=list(pool.feat_size), num_prefix_tokens=1
    )
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + places
    assert pool.q is not None
    assert pool.k is not None
    assert pool.v is not None
    return _attend(in_full(pool.q, x[:, :1]), pool.k(x), pool.v(x), pool.num_heads, pool.proj)[:, 0]


def _of_tokens(pool: AttentionPoolLatent, x: Tensor) -> Tensor:
    """The query is learned."""
    keys, values = pool.kv(x).chunk(2, dim=-1)
    query = in_full(pool.q, pool.latent.expand(len(x), -1, -1))
    pooled = _attend(query, keys, values, pool.num_heads, pool.proj)
    with full_precision(pooled):
        return (pooled if pool.mlp is None else pooled + pool.mlp(pool.norm(pooled)))[:, 0]


def _plain(pool: AttentionPoolLatent) -> bool:
    """Whether it has nothing beyond what SigLIP's has."""
    norms = pool.q_norm, pool.k_norm
    bare = pool.pos_embed is None and all(isinstance(norm, nn.Identity) for norm in norms)
    return bare and pool.latent_len == 1 and pool.pool == "token"


def _attend(query: Tensor, keys: Tensor, values: Tensor, heads: int, project: nn.Module) -> Tensor:
    """What one query (B, 1, D) sees of keys and values (B, K, D), mapped, in float32."""
    q, k, v = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, keys, values))
    with full_precision(q):
        seen: Tensor = project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return seen
