"""From a specification to a network whose output is the embedding: a trunk as upstream built it, and its readout.

``trunk`` holds all tensors of a checkpoint under its own names; weights are loaded into it strictly before
:meth:`Network.narrow` takes out the blocks that the readout does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pvrpipe.pipeline.autoencoder import ConvEncoder
from pvrpipe.pipeline.full_precision import in_full
from pvrpipe.pipeline.own import PACKAGE, package_pvr, package_trunk
from pvrpipe.pipeline.pvrs import Pvr
from pvrpipe.schemas.errors import InvalidValueError, WeightsError, one_line


class Network(nn.Module):
    """A trunk, and what of it is the embedding; this one takes the trunk's own output, by the name that it has."""

    poolings: tuple[str, ...] = ("pooled",)
    blocks: tuple[int, ...] | None = None
    layer = "last"
    final_norm = False
    normed = False
    """whether there is a final norm to choose"""
    patch: int | None = None
    """pixels of a side of what becomes one token"""

    def __init__(self, trunk: nn.Module, pvr: Pvr, poolings: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.pooling = pvr.pooling
        self.poolings = poolings or self.poolings
        if pvr.pooling not in self.poolings:
            raise InvalidValueError(
                f"--pool {pvr.pooling}: {pvr.name} has {', '.join(self.poolings)}; choose one of them"
            )
        self._choose(pvr)

    def _choose(self, pvr: Pvr) -> None:
        """Check the layer and the blocks that are asked for."""
        if pvr.layer != "last" or pvr.blocks is not None:
            raise InvalidValueError(
                f"{pvr.name} has no layers to choose from; leave --layer and --blocks out"
            )

    def narrow(self) -> None:
        """Take out what the readout does not need, once the weights are loaded."""

    def channels_last(self) -> Network:
        """Two-dimensional convolutions with their channels last in memory, as their inputs are."""
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to embeddings (B, …)."""
        return self.trunk(x)


class OwnOutput(Network):
    """A network of timm: its own output, and nothing else."""

    def __init__(self, trunk: nn.Module, pvr: Pvr) -> None:
        from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d

        super().__init__(trunk, pvr)
        for module in trunk.modules():
            if isinstance(module, SelectAdaptivePool2d):  # an average of bfloat16 would be rounded to it
                module.register_forward_pre_hook(_widened)

    def _choose(self, pvr: Pvr) -> None:
        if pvr.layer != "last" and (names := _stage_names(self.trunk)):
            raise InvalidValueError(
                f"--layer {pvr.layer}: {pvr.name} gives its own output, which has no layers; give --pool average or "
                f"--pool conv-map with one of {', '.join(names)}"
            )
        super()._choose(pvr)


def _widened(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in given)


class TokenNetwork(Network):
    """A vision transformer: tokens after some of its blocks, pooled."""

    def __init__(self, trunk: nn.Module, pvr: Pvr) -> None:
        self.poolings = _token_poolings(trunk)
        self.patch = _patch_of(trunk)
        super().__init__(trunk, pvr)

    def _choose(self, pvr: Pvr) -> None:
        depth = len(self.trunk.blocks)  # type: ignore[arg-type]
        kept = tuple(range(depth)) if pvr.blocks is None else pvr.blocks
        try:
            wanted = [kept[-1]] if pvr.layer == "last" else [int(n) for n in pvr.layer.split(",")]
        except ValueError:
            wanted = [depth]
        wanted = sorted({n + depth if n < 0 else n for n in wanted})
        has = f"{pvr.name} has blocks 0 to {depth - 1}"
        if not set(kept) <= set(range(depth)):
            raise InvalidValueError(f"--blocks {_listed(kept)}: {has}; give some of them")
        if not set(wanted) <= set(kept):
            left = "" if pvr.blocks is None else f", of which --blocks leaves {_listed(kept)}"
            raise InvalidValueError(f"--layer {pvr.layer}: {has}{left}; give some of them, or `last`")
        self.blocks = tuple(n for n in kept if n <= wanted[-1])
        self.places = [self.blocks.index(n) for n in wanted]
        self.layer = "last" if wanted == [depth - 1] else _listed(wanted)
        norm, own = getattr(self.trunk, "norm", None), self.pooling == "pooled"
        # timm has an empty one where the norm is of what is pooled (its models that average), which no token sees
        self.normed = norm is not None and not own and not isinstance(norm, nn.Identity)
        self.final_norm = pvr.final_norm and (self.normed or (own and norm is not None))
        if self.pooling == "pooled" and (self.layer, len(self.blocks)) != ("last", depth):
            raise InvalidValueError(
                "--pool pooled is the network's own output; choose another --pool with a layer"
            )

    def narrow(self) -> None:
        """Keep the blocks that compute, and of positions that each block has of its own, theirs."""
        assert self.blocks is not None
        blocks: Any = self.trunk.blocks
        self.trunk.blocks = nn.Sequential(*(blocks[n] for n in self.blocks))
        by_block: Any = getattr(getattr(self.trunk, "rope", None), "freqs", None)  # (2, blocks, heads, D / 2)
        if by_block is not None:
            self.trunk.rope.freqs = nn.Parameter(by_block[:, list(self.blocks)])  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to (B, D), or to tokens (B, K, D)."""
        if self.pooling == "pooled":
            return self.trunk(x)
        pooled = [self._pool(patches, prefix) for patches, prefix in self._tokens(x)]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)

    def _tokens(self, x: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        if hasattr(self.trunk, "tokens"):
            return self.trunk.tokens(x, self.places, self.final_norm)  # type: ignore[operator]
        options: dict[str, Any] = {"stop_early": True, "output_fmt": "NLC", "intermediates_only": True}
        if self.trunk.num_prefix_tokens:  # some of timm's fail where they have none to return
            options["return_prefix_tokens"] = True
        outputs = self.trunk.forward_intermediates(  # type: ignore[operator]
            x, indices=self.places, norm=self.final_norm, **options
        )
        return [y if isinstance(y, tuple) else (y, y[:, :0]) for y in outputs]

    def _pool(self, patches: Tensor, prefix: Tensor) -> Tensor:
        match self.pooling:
            case "cls":
                return prefix[:, 0]
            case "cls+registers":
                return prefix.flatten(1)
            case "summary":
                return prefix[:, self.trunk.summaries].flatten(1)  # type: ignore[index]
            case "mean":
                return patches.mean(dim=1, dtype=torch.float32)
            case "map":
                seen = [prefix, patches] if getattr(self.trunk, "pool_include_prefix", True) else [patches]
                return _attended(self.trunk.attn_pool, torch.cat(seen, dim=1))  # type: ignore[arg-type]
            case "projected":
                return in_full(self.trunk.head, prefix[:, 0])  # type: ignore[arg-type]
            case _:
                return patches


def _listed(blocks: Sequence[int]) -> str:
    return ",".join(map(str, blocks))


def _attended(pool: nn.Module, x: Tensor) -> Tensor:
    from pvrpipe.pipeline.attention_pools import attention_pooled  # it needs timm, which the others do not

    return attention_pooled(pool, x)


def _patch_of(trunk: nn.Module) -> int | None:
    patch = getattr(trunk, "patch", None) or getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    return patch[0] if isinstance(patch, tuple) else patch


def _token_poolings(trunk: nn.Module) -> tuple[str, ...]:
    """What the tokens of a trunk can be pooled to."""
    prefix = int(trunk.num_prefix_tokens)  # type: ignore[arg-type]
    # timm's with registers alone have None for it; a network of one's own need not call it so
    classed = prefix > 0 and getattr(getattr(trunk, "embeds", trunk), "cls_token", True) is not None
    has = {
        "cls": classed,
        "cls+registers": classed and prefix > 1,
        "mean": True,
        "map": isinstance(getattr(trunk, "attn_pool", None), nn.Module),
        "projected": isinstance(getattr(trunk, "head", None), nn.Linear),
        "patches": True,
        "summary": bool(getattr(trunk, "summaries", ())),
        "pooled": hasattr(trunk, "forward_intermediates"),
    }
    return tuple(name for name, there in has.items() if there)


class MapNetwork(Network):
    """A convolutional network: the map after one of its stages, pooled or as it is."""

    def __init__(self, trunk: nn.Module, pvr: Pvr) -> None:
        self.stages = _stages(trunk)
        heads = [name for name, there in (("map", "head"), ("projected", "fc")) if _has(trunk, there)]
        self.poolings = ("average", "conv-map", "flat", *heads)
        super().__init__(trunk, pvr)

    def _choose(self, pvr: Pvr) -> None:
        names = list(self.stages)
        if pvr.blocks is not None or pvr.layer not in ("last", *names):
            asked = f"--layer {pvr.layer}" if pvr.blocks is None else "--blocks"
            raise InvalidValueError(
                f"{asked}: {pvr.name} has the stages {', '.join(names)}; give one of them with --layer"
            )
        self.layer = "last" if pvr.layer == names[-1] else pvr.layer
        if self.layer != "last":
            if self.pooling in ("map", "projected"):
                raise InvalidValueError(f"--pool {self.pooling} is of the last stage; leave --layer out")
            self.stages = {name: self.stages[name] for name in names[: names.index(self.layer) + 1]}

    def _map(self, x: Tensor) -> Tensor:
        for stage in self.stages.values():
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to (B, D), or to a map (B, C, h, w)."""
        x = self._map(x)
        match self.pooling:
            case "average":
                return _averaged(x)
            case "flat":
                return x.flatten(1)
            case "map":
                return _attended(self.trunk.head, x)  # type: ignore[arg-type]
            case "projected":
                return in_full(self.trunk.fc, _averaged(x))  # type: ignore[arg-type]
            case _:
                return x


def _averaged(x: Tensor) -> Tensor:
    """Maps (B, C, h, w) to (B, C), in float32 whatever they were computed in."""
    return x.mean(dim=(2, 3), dtype=torch.float32)


class StagedNetwork(MapNetwork):
    """Another network of timm's whose features are maps: those after the stages that timm lists, without a norm."""

    def __init__(self, trunk: nn.Module, pvr: Pvr) -> None:
        self.stages = dict.fromkeys(_stage_names(trunk), nn.Identity())
        self.poolings = ("average", "conv-map", "flat")
        Network.__init__(self, trunk, pvr)

    def _map(self, x: Tensor) -> Tensor:
        options = {"stop_early": True, "output_fmt": "NCHW", "intermediates_only": True, "norm": False}
        (found,) = self.trunk.forward_intermediates(x, indices=[len(self.stages) - 1], **options)  # type: ignore[operator]
        return found


def _stage_names(trunk: nn.Module) -> tuple[str, ...]:
    """What ``--layer`` calls the stages of a network of timm; none where it has no maps."""
    named = tuple(_stages(trunk))
    if named != ("whole",):
        return named
    listed: Any = trunk.feature_info if hasattr(trunk, "forward_intermediates") else ()
    return tuple(f"stage{n}" for n in range(len(listed)))


def _has(trunk: nn.Module, name: str) -> bool:
    module = getattr(trunk, name, None)
    return module is not None and any(True for _ in module.parameters())


def _stages(trunk: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """The stages of a ResNet of timm, or the whole of another network."""
    if hasattr(trunk, "layer4") and hasattr(trunk, "maxpool"):
        stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.act1, trunk.maxpool)  # type: ignore[arg-type]
        return {"stem": stem, **{f"layer{n}": getattr(trunk, f"layer{n}") for n in range(1, 5)}}
    if isinstance(getattr(trunk, "final_conv", None), nn.Identity) and hasattr(trunk, "stages"):  # CLIP's
        stages = {f"layer{n}": stage for n, stage in enumerate(trunk.stages, 1)}  # type: ignore[arg-type]
        return {"stem": trunk.stem, **stages}
    return {"whole": trunk}


def _taskonomy(pvr: Pvr) -> Network:
    from pvrpipe.pipeline.taskonomy import TaskonomyEncoder

    return MapNetwork(TaskonomyEncoder(**pvr.overrides), pvr)


def _r2d2(pvr: Pvr) -> Network:
    from pvrpipe.pipeline.r2d2 import R2D2

    return Network(R2D2(**pvr.overrides), pvr, ("keypoints",))  # type: ignore[arg-type]


def _radio(pvr: Pvr) -> Network:
    from pvrpipe.pipeline.radio import Radio

    return TokenNetwork(Radio(**pvr.overrides), pvr)  # type: ignore[arg-type]


def _vjepa2(pvr: Pvr) -> Network:
    from pvrpipe.pipeline.vjepa2 import VJepa2

    return TokenNetwork(VJepa2(**pvr.overrides), pvr)


def _autoencoder(pvr: Pvr) -> Network:
    encoder = ConvEncoder(**pvr.overrides, width=pvr.width)  # type: ignore[arg-type]
    return Network(encoder, pvr, ("flat",))


def _timm(pvr: Pvr) -> Network:
    import timm  # a second of imports that the others do not need

    if ":" in pvr.architecture:  # timm would fetch it, unpinned
        raise ValueError("it names a place, not a network of timm's")
    overrides: dict[str, Any] = {"num_classes": 0, **pvr.overrides}
    epsilon = overrides.pop("layer_norm_eps", None)
    trunk: nn.Module = timm.create_model(pvr.architecture, **overrides)
    tokens = hasattr(trunk, "num_prefix_tokens") and hasattr(trunk, "blocks")
    if pvr.projection is not None:
        if not tokens:
            raise ValueError("a projection is of tokens, and it has none")
        trunk.head = nn.Linear(trunk.num_features, pvr.projection, bias=False)  # type: ignore[arg-type]
    if epsilon is not None:
        for module in trunk.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = epsilon
    if pvr.positions == "rope-bf16":
        _round_periods(trunk.rope)
    if tokens:
        return TokenNetwork(trunk, pvr)
    if pvr.pooling == "pooled" or not _stage_names(trunk):
        return OwnOutput(trunk, pvr)
    return (StagedNetwork if "whole" in _stages(trunk) else MapNetwork)(trunk, pvr)


def _round_periods(rope: Any) -> None:
    """The authors' checkpoint of DINOv3 holds the periods of its positions in bfloat16; timm has them in float32."""
    rope.periods.copy_(rope.periods.bfloat16())
    if rope.pos_embed_cached is not None:
        rope._cache_embed(rope.feat_shape)


def _package(pvr: Pvr) -> Network:
    trunk = package_trunk(pvr)
    if hasattr(trunk, "tokens"):
        return TokenNetwork(trunk, pvr)
    return Network(trunk, pvr, (package_pvr(pvr.architecture.removeprefix(PACKAGE)).pooling,))


ARCHITECTURES: dict[str, Callable[[Pvr], Network]] = {
    "conv-autoencoder": _autoencoder,
    "taskonomy": _taskonomy,
    "r2d2": _r2d2,
    "radio": _radio,
    "vjepa2": _vjepa2,
}


def build_network(pvr: Pvr, seed: int) -> Network:
    """The network with fresh weights drawn from ``seed``; its output is the embedding.

    Raises:
        WeightsError: the specification's architecture cannot be built.
        InvalidValueError: it has no such layer or pooling.
    """
    packaged = pvr.architecture.startswith(PACKAGE)
    build = _package if packaged else ARCHITECTURES.get(pvr.architecture, _timm)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return build(pvr)
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{pvr.name}: architecture '{pvr.architecture}' with {pvr.overrides} cannot be built "
                f"({one_line(error)[:120]}); mend its specification"
            ) from error
