"""R2D2: descriptors of the keypoints that are most reliable and repeatable (Revaud et al. 2019).

The network is the authors' Quad L2-Net with two confidence maps, at full resolution by dilation
(naver/r2d2: nets/patchnet.py); the detector is theirs (extract.py) at the one scale that frames of 256
pixels have there. As many descriptors as the study keeps, the best first; zeros where a frame has fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvrpipe.pipeline.full_precision import full_precision

WIDTH = 128
THRESHOLD = 0.7  # of both confidences, extract.py
#: channels, kernel, stride (spent as dilation of what follows), batch norm, ReLU
CONVOLUTIONS = (
    (32, 3, 1, True, True),
    (32, 3, 1, True, True),
    (64, 3, 2, True, True),
    (64, 3, 1, True, True),
    (128, 3, 2, True, True),
    (128, 3, 1, True, True),
    (128, 2, 2, True, False),
    (128, 2, 2, True, False),
    (WIDTH, 2, 2, False, False),
)


class R2D2(nn.Module):
    """Frames (B, 3, H, W) to the descriptors of the best keypoints (B, K, 128)."""

    def __init__(self, keypoints: int) -> None:
        super().__init__()
        self.keypoints = keypoints
        self.ops = nn.ModuleList()
        inputs, dilation = 3, 1
        for channels, kernel, stride, norm, relu in CONVOLUTIONS:
            padding = (kernel - 1) * dilation // 2
            self.ops.append(nn.Conv2d(inputs, channels, kernel, padding=padding, dilation=dilation))
            if norm:
                self.ops.append(nn.BatchNorm2d(channels, affine=False))
            if relu:
                self.ops.append(nn.ReLU())
            inputs, dilation = channels, dilation * stride
        self.clf = nn.Conv2d(WIDTH, 2, 1)
        self.sal = nn.Conv2d(WIDTH, 1, 1)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Descriptors (B, 128, H, W) of length one; reliability and repeatability (B, 1, H, W) in [0, 1].

        The confidences are computed in float32 always: in bfloat16 neighbours tie, and others become peaks.
        """
        for op in self.ops:
            x = op(x)
        with full_precision(x):
            x = x.float()
            reliability = self.clf(x**2).softmax(dim=1)[:, 1:]
            repeatability = F.softplus(self.sal(x**2))
            return F.normalize(x, dim=1), reliability, repeatability / (1 + repeatability)

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch."""
        descriptors, reliability, repeatability = self.maps(x)
        peak = repeatability == F.max_pool2d(repeatability, 3, stride=1, padding=1)
        taken = peak & (repeatability >= THRESHOLD) & (reliability >= THRESHOLD)
        score = torch.where(taken, reliability * repeatability, -1.0).flatten(1)
        best, place = score.topk(self.keypoints, dim=1)
        found = descriptors.flatten(2).transpose(1, 2).take_along_dim(place[..., None], dim=1)
        return found * (best > 0)[..., None]
