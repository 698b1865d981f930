"""One world-model update of ours against TorchRL's DreamerV3 model loss: same sizes, same optimizer, interleaved.

    python benchmarks/train.py --sizes 1m 12m --shapes 16x64 8x32 --repeats 11 --json train.json
    python benchmarks/train.py --sizes 1m --shapes 4x16 --encoder mae-b --repeats 3

Both do the same work on the same batch: linear map from the embedding, block-GRU posterior, prior, KL,
decoder, reward and continue heads, backward, AGC and LaProp; no actor, no data loading. Medians, taken in
turns so that a drifting machine disturbs both alike; the ratios are the medians of the ratios of each turn.

plain       our networks, one step after the other by automatic differentiation (``--plain``)
compiled    TorchRL's, with the prior and the posterior inside its recurrence compiled (``--compiled``)
encoder     our update behind a frozen encoder that reads the batch's frames first, as DINO-WM and stable-worldmodel
            do in every update (``--encoder``; random weights, which cost the same)
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules.models.model_based import DreamerV3MLP, RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3
from torchrl.objectives import DreamerV3ModelLoss

from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.worldmodel.compiling import EAGER, Replayed, losses_of
from pvrpipe.worldmodel.distributions import straight_through
from pvrpipe.worldmodel.dreamerv3 import SIZES
from pvrpipe.worldmodel.inputs import vector
from pvrpipe.worldmodel.models import Setting, build_model
from pvrpipe.worldmodel.optimizer import LaProp
from pvrpipe.worldmodel.rssm import RSSM


def main() -> None:
    """Measure, print a table, write JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    others = [
        "TorchRL",
        *(["plain"] if options.plain else []),
        *(["compiled"] if options.compiled else []),
        *(["encoder"] if options.encoder else []),
    ]
    heads = "".join(f"{other + ' ms':>13} {'ratio':>8}" for other in others)
    print(f"{'size':>5} {'B x T':>7} {'pvrpipe ms':>11}{heads}")
    results = []
    for size, shape in itertools.product(options.sizes, options.shapes):
        options.batch, options.length = (int(side) for side in shape.split("x"))
        results.append(r := measure(size, others, options))
        numbers = "".join(f"{r['ms'][other]:>13.1f} {r['ratio'][other]:>8.2f}" for other in others)
        print(f"{size:>5} {shape:>7} {r['ms']['pvrpipe']:>11.1f}{numbers}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"threads": options.threads, "results": results}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["1m", "12m"], choices=list(SIZES))
    parser.add_argument("--shapes", nargs="+", default=["16x64"], help="of the batch, BxT")
    parser.add_argument("--compile", action="store_true", help="pvrpipe's compiled, as train-model --compile")
    parser.add_argument("--plain", action="store_true", help="a plain loop over our networks too")
    parser.add_argument("--compiled", action="store_true", help="TorchRL compiled too")
    parser.add_argument("--encoder", help="a PVR that is run in every update too, e.g. mae-b")
    parser.add_argument("--width", type=int, default=768, help="of the embedding")
    parser.add_argument("--action", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--device", default="cpu", type=torch.device, help="on cuda, ours is replayed as a CUDA graph"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(size: str, others: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All updates in turns."""
    batch = random_batch(options)
    make = {
        "TorchRL": lambda: torchrl_update(size, batch, options),
        "plain": lambda: our_update(size, batch, options, plain=True),
        "compiled": lambda: torchrl_update(size, batch, options, compiled=True),
        "encoder": lambda: behind_encoder(our_update(size, batch, options), options),
    }
    updates = {"pvrpipe": our_update(size, batch, options), **{other: make[other]() for other in others}}
    for update in updates.values():
        for _ in range(EAGER + 2 if options.device.type == "cuda" else 1):
            update()
    turns = [
        {name: timed(update, options.device) for name, update in updates.items()}
        for _ in range(options.repeats)
    ]
    with torch.device("meta"):
        model = build_model("dreamerv3", size, setting_of(options), seed=0)
    return {
        "size": size,
        "batch": options.batch,
        "length": options.length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms": {name: 1e3 * statistics.median(turn[name] for turn in turns) for name in updates},
        "ratio": {name: statistics.median(turn[name] / turn["pvrpipe"] for turn in turns) for name in others},
    }


def behind_encoder(update: Callable[[], object], options: argparse.Namespace) -> Callable[[], object]:
    """The same update once a frozen encoder has read the batch's frames, 224 pixels a side."""
    encoder = Encoder(EncoderRequest(options.encoder, "random:0", device=str(options.device)))
    shape = (options.batch * options.length, 224, 224, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=options.device)

    def both() -> None:
        for part in frames.split(encoder.batch):
            encoder.encode(part)
        update()

    return both


def timed(update: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, to the end of what it gave a GPU to do."""
    begun = time.perf_counter()
    update()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def random_batch(options: argparse.Namespace) -> dict[str, Tensor]:
    """Noise of the right shapes, (B, T, ...)."""
    B, T = options.batch, options.length
    is_first = torch.zeros(B, T, dtype=torch.bool)
    is_first[:, 0] = True
    batch = {
        "observation": torch.randn(B, T, options.width),
        "action": torch.rand(B, T, options.action) * 2 - 1,
        "reward": torch.rand(B, T),
        "is_first": is_first,
        "is_terminal": torch.zeros(B, T, dtype=torch.bool),
    }
    return {name: rows.to(options.device) for name, rows in batch.items()}


def optimised(
    loss: Callable[..., Tensor], parameters: list[nn.Parameter]
) -> Callable[..., dict[str, Tensor]]:
    """Loss, backward and the same optimizer for both."""
    optimizer = LaProp(parameters)

    def update(*given: Any) -> dict[str, Tensor]:
        optimizer.zero_grad()
        found = loss(*given)
        found.backward()
        optimizer.step()
        return {"loss": found.detach()}

    return update


def setting_of(options: argparse.Namespace) -> Setting:
    """A store of one embedding a row."""
    return Setting(vector(options.width), options.action, state=0, steps=500, episodic=False)


def our_update(
    size: str, batch: dict[str, Tensor], options: argparse.Namespace, *, plain: bool = False
) -> Callable[[], object]:
    """One update of pvrpipe's DreamerV3, filtering by its scan or by a plain loop."""
    model = build_model("dreamerv3", size, setting_of(options), seed=0).to(options.device)
    if plain:
        model.rssm.observe = functools.partial(plain_observe, model.rssm)
    random = torch.Generator().manual_seed(0)
    losses = losses_of(model, options.device, compiled=options.compile and not plain)
    update = optimised(lambda batch, drawn: losses(batch, drawn)[0], list(model.parameters()))
    if options.device.type == "cuda" and not plain:
        update = Replayed(update)
    return lambda: update(batch, model.draw(batch, random))


def plain_observe(
    rssm: RSSM, tokens: Tensor, action: Tensor, is_first: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What :meth:`RSSM.observe` computes, written down as it is read."""
    B, T, _ = tokens.shape
    deter = tokens.new_zeros(B, rssm.size.deter)
    stoch = tokens.new_zeros(B, rssm.size.categoricals, rssm.size.classes)
    before = torch.zeros_like(action[:, 0])
    rows = []
    for t in range(T):
        keep = (~is_first[:, t]).unsqueeze(-1)
        deter = rssm.step(deter * keep, stoch * keep.unsqueeze(-1), before * keep)
        logits = rssm.posterior_logits(deter, tokens[:, t])
        stoch, before = straight_through(logits, uniform[:, t]), action[:, t]
        rows.append((deter, stoch, logits))
    deters, stochs, all_logits = (torch.stack(row, 1) for row in zip(*rows, strict=True))
    return deters, stochs, all_logits


def torchrl_update(
    size: str, batch: dict[str, Tensor], options: argparse.Namespace, *, compiled: bool = False
) -> Callable[[], object]:
    """One update of the same model put together from TorchRL's parts, as they come (eager) or compiled."""
    world_model, loss = torchrl_model(size, options, compiled)
    loss.to(options.device)
    B, T, _ = batch["observation"].shape
    widths = SIZES[size]
    data = TensorDict(
        {
            "state": torch.zeros(B, T, widths.categoricals * widths.classes),
            "belief": torch.zeros(B, T, widths.deter),
            "action": F.pad(batch["action"][:, :-1], (0, 0, 1, 0)),
            "is_init": batch["is_first"].unsqueeze(-1),
            "next": {
                "pixels": batch["observation"],
                "reward": batch["reward"].unsqueeze(-1),
                "done": batch["is_terminal"].unsqueeze(-1),
                "terminated": batch["is_terminal"].unsqueeze(-1),
            },
        },
        [B, T],
        device=options.device,
    )

    def total() -> Tensor:
        terms, _ = loss(data.clone(recurse=False))
        return torch.stack([v.sum() for k, v in terms.items() if k.startswith("loss")]).sum()

    return optimised(total, list(world_model.parameters()))


def torchrl_model(
    size: str, options: argparse.Namespace, compiled: bool
) -> tuple[nn.Module, DreamerV3ModelLoss]:
    """TorchRL's world model and its loss, in the current DreamerV3's settings."""
    w = SIZES[size]
    width, features = w.categoricals * w.classes, ["state", "belief"]
    prior = RSSMPriorV3(
        action_shape=torch.Size([options.action]),
        hidden_dim=w.hidden,
        rnn_hidden_dim=w.deter,
        num_categoricals=w.categoricals,
        num_classes=w.classes,
        action_dim=options.action,
        recurrent_model="block_gru",
        num_blocks=w.blocks,
        unimix=0.01,
    )
    posterior = RSSMPosteriorV3(
        hidden_dim=w.hidden,
        rnn_hidden_dim=w.deter,
        num_categoricals=w.categoricals,
        num_classes=w.classes,
        obs_embed_dim=w.units,
        use_rms_norm=True,
        unimix=0.01,
    )

    if compiled:
        prior, posterior = torch.compile(prior), torch.compile(posterior)

    def after(module: nn.Module, inputs: list[str], outputs: list[str]) -> TensorDictModule:
        return TensorDictModule(
            module, in_keys=[("next", k) for k in inputs], out_keys=[("next", k) for k in outputs]
        )

    rollout = RSSMRolloutV3(
        TensorDictModule(
            prior,
            in_keys=["state", "belief", "action"],
            out_keys=[("next", k) for k in ("prior_logits", "state", "belief")],
        ),
        after(posterior, ["belief", "encoded_latents"], ["posterior_logits", "state"]),
    )
    world_model = TensorDictSequential(
        after(nn.Linear(options.width, w.units), ["pixels"], ["encoded_latents"]),
        rollout,
        after(DreamerV3MLP(w.deter + width, options.width, 3, w.units), features, ["reco_pixels"]),
        after(DreamerV3MLP(w.deter + width, 255, 1, w.units, outscale=0.0), features, ["reward_logits"]),
        after(DreamerV3MLP(w.deter + width, 1, 1, w.units), features, ["continue_pred"]),
    )
    world_model.to(options.device)
    return world_model, DreamerV3ModelLoss(world_model, kl_mode="separate", unimix=0.01, lambda_continue=1.0)


if __name__ == "__main__":
    main()
