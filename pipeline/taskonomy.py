"""The encoder of Taskonomy's networks, as visual-prior publishes them (Zamir et al. 2018; Sax et al. 2019).

A ResNet-50 of its own: the stride is in the last block of a stage, the pooling rounds up, and a 3 × 3
convolution compresses the result to 8 channels, which are normalised one by one
(alexsax/visual-prior: taskonomy_network.py). torchvision's and timm's ResNets cannot express it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 8
STAGES = ((64, 3, 2), (128, 4, 2), (256, 6, 1), (512, 3, 1))  # planes, blocks, stride of the last


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3, 1 × 1; a block with a stride takes every other pixel of its input as the residual."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.stride = stride
        if inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )
        else:
            self.downsample = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 4 × planes, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        residual = self.downsample(x)[:, :, :: self.stride, :: self.stride]
        return F.relu(self.bn3(self.conv3(y)) + residual)


class TaskonomyEncoder(nn.Module):
    """Frames (B, 3, 256, 256) in [-1, 1] to maps (B, 8, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, (planes, blocks, stride) in enumerate(STAGES, 1):
            stage = [
                Bottleneck(inputs if n == 0 else 4 * planes, planes, stride if n == blocks - 1 else 1)
                for n in range(blocks)
            ]
            setattr(self, f"layer{number}", nn.Sequential(*stage))
            inputs = 4 * planes
        self.compress1 = nn.Conv2d(inputs, CHANNELS, 3, padding=1, bias=False)
        self.compress_bn = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, ceil_mode=True)
        for number in range(1, len(STAGES) + 1):
            x = getattr(self, f"layer{number}")(x)
        return F.group_norm(F.relu(self.compress_bn(self.compress1(x))), CHANNELS)
