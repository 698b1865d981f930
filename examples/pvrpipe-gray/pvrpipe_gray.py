"""A whole representation for pvrpipe: brightness on a coarse grid, weighed by one learned number per colour."""

from torch import nn
from torch.nn import functional as F

from pvrpipe.pipeline.pvrs import Properties, Pvr, WeightsSource, recipe

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

pvr = Pvr(
    name="gray",
    title="Brightness on a grid",
    source=WeightsSource(file="gray.safetensors"),  # no repository: it is given with --weights
    architecture="package:gray",  # built by `build` below, with these overrides
    overrides={"side": 8},
    recipe=recipe(64, "bilinear", PLAIN, crop=64),
    pooling="pooled",
    width=64,
    licence="Apache-2.0",
    properties=Properties(trained_on="nothing"),
)


def build(side):
    """The network: pixels (B, 3, H, W) in, embeddings (B, D) out; its tensors are loaded strictly."""
    return Gray(side)


class Gray(nn.Module):
    """Frames (B, 3, H, W) to embeddings (B, side²)."""

    def __init__(self, side):
        super().__init__()
        self.side = side
        self.weigh = nn.Conv2d(3, 1, 1, bias=False)

    def forward(self, x):
        """Encode a batch."""
        return F.adaptive_avg_pool2d(self.weigh(x), self.side).flatten(1)
