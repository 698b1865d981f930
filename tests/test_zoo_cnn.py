"""Convolutional representations in upstream's own layout equal torchvision, or a float64 reference written here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from pvrpipe.pipeline.encoders import Encoder, EncoderRequest, Precision
from pvrpipe.pipeline.readout import Readout

from .upstream import (
    FRAMES,
    embed_with,
    encoder_with,
    noise,
    pixels_for,
    pixels_of,
    randomised,
    relative_error,
)

PRECISIONS: tuple[Precision, Precision] = ("fp32", "bf16")


def resnet(depth: int) -> nn.Module:
    return randomised(getattr(torchvision.models, f"resnet{depth}")())


def pooled(reference: nn.Module, pixels: Tensor) -> Tensor:
    """The average pool of a torchvision ResNet."""
    fc, reference.fc = reference.fc, nn.Identity()
    with torch.no_grad():
        value = reference(pixels)
    reference.fc = fc
    return value


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_r3m_equals_torchvision(tmp_path: Path, depth: int) -> None:
    reference = resnet(depth)
    state = {f"module.convnet.{k}": v for k, v in reference.state_dict().items() if not k.startswith("fc")}
    state["module.lang_enc.model.embeddings.weight"] = noise(3, 3)
    state["module.lang_rew.pred.0.weight"] = noise(3, 3)
    torch.save({"r3m": state, "global_step": 1}, tmp_path / f"r3m_{depth}.pt")
    name = f"r3m-{depth}"
    ours, theirs = embed_with(name, tmp_path), pooled(reference, pixels_for(name))
    assert relative_error(ours, theirs) < 1e-5
    undivided = pooled(reference, pixels_for(name) * 255)  # frames of 0 … 255 that nobody divided
    assert relative_error(ours, undivided) > 1e-2
    assert relative_error(ours, pooled(reference.train(), pixels_for(name))) > 1e-2  # statistics of the batch


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_resnets_equal_torchvisions(tmp_path: Path, depth: int) -> None:
    name, reference = f"resnet{depth}", resnet(depth)
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "model.safetensors")
    assert relative_error(embed_with(name, tmp_path), pooled(reference, pixels_for(name))) < 1e-5


def test_vip_keeps_its_linear_map(tmp_path: Path) -> None:
    reference = resnet(50)
    reference.fc = randomised(nn.Linear(2048, 1024), seed=3)
    state = {f"module.convnet.{k}": v for k, v in reference.state_dict().items()}
    torch.save({"vip": state, "global_step": 1}, tmp_path / "model.pt")
    with torch.no_grad():
        theirs = reference(pixels_for("vip"))
    assert relative_error(embed_with("vip", tmp_path), theirs) < 1e-5
    average = embed_with("vip", tmp_path, pooling="average")
    assert relative_error(average, pooled(reference, pixels_for("vip"))) < 1e-5


@pytest.mark.parametrize("name", ["mocov2", "mocov3-rn50"])
def test_moco_equals_torchvision(tmp_path: Path, name: str) -> None:
    reference = resnet(50)
    ours, other = ("encoder_q", "encoder_k") if name == "mocov2" else ("base_encoder", "momentum_encoder")
    state = {f"module.{ours}.{k}": v for k, v in reference.state_dict().items() if not k.startswith("fc")}
    state[f"module.{ours}.fc.0.weight"] = noise(3, 3)
    state[f"module.{other}.conv1.weight"] = noise(3, 3)
    state["module.queue" if name == "mocov2" else "module.predictor.0.weight"] = noise(3, 3)
    state |= {"module.queue_ptr": torch.zeros(1)} if name == "mocov2" else {}
    torch.save(
        {"epoch": 800, "arch": "resnet50", "state_dict": state, "optimizer": {}}, tmp_path / "w.pth.tar"
    )
    theirs = pooled(reference, pixels_for(name))
    assert relative_error(embed_with(name, tmp_path / "w.pth.tar"), theirs) < 1e-5


def test_pieg_is_the_map_after_layer2_of_frames_as_they_are(tmp_path: Path) -> None:
    reference = resnet(18)
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "model.safetensors")
    frames = np.ascontiguousarray(FRAMES[:, :84, :84])
    encoder = encoder_with("pieg", tmp_path)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - 0.5
    with torch.no_grad():
        x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        theirs = reference.layer2(reference.layer1(x))
    assert encoder.identity_on(84, 84).shape == (128, 11, 11)
    assert relative_error(embed_with("pieg", tmp_path, frames), theirs) < 1e-5
    assert encoder.identity_on(112, 112).shape == (128, 14, 14)
    normalised = encoder_with("resnet18", tmp_path, layer="layer2", pooling="conv-map", size=84)
    assert relative_error(normalised(frames), theirs) > 1e-2  # ImageNet's mean and deviation are not PIE-G's


def reference_taskonomy(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """alexsax/visual-prior's TaskonomyEncoder in float64, step by step from its tensors."""
    state = {name: value.double() for name, value in state.items()}

    def norm(y: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        y = (y - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        return y * state[f"{name}.weight"].view(1, -1, 1, 1) + state[f"{name}.bias"].view(1, -1, 1, 1)

    x = F.pad(x.double(), (3, 3, 3, 3))
    x = norm(F.conv2d(x, state["conv1.weight"], stride=2), "bn1").relu()
    x = F.max_pool2d(x, 3, stride=2, padding=0, ceil_mode=True)
    for stage, (blocks, stride) in enumerate(((3, 2), (4, 2), (6, 1), (3, 1)), 1):
        for n in range(blocks):
            at, step = f"layer{stage}.{n}", stride if n == blocks - 1 else 1
            y = norm(F.conv2d(x, state[f"{at}.conv1.weight"]), f"{at}.bn1").relu()
            y = norm(F.conv2d(y, state[f"{at}.conv2.weight"], stride=step, padding=1), f"{at}.bn2").relu()
            y = norm(F.conv2d(y, state[f"{at}.conv3.weight"]), f"{at}.bn3")
            if f"{at}.downsample.0.weight" in state:
                x = norm(F.conv2d(x, state[f"{at}.downsample.0.weight"]), f"{at}.downsample.1")
            elif step > 1:
                x = F.max_pool2d(x, 1, stride=step)
            x = (x + y).relu()
    x = norm(F.conv2d(x, state["compress1.weight"], padding=1), "compress_bn").relu()
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim=(2, 3), keepdim=True) + 1e-5).sqrt()


def taskonomy_encoder() -> nn.Module:
    """With residual branches that add a part of what they see, as trained ones do.

    Otherwise values grow to thousands over 16 blocks, ReLU leaves single pixels of a map, and the norm amplifies
    what float32 lost on the way.
    """
    from pvrpipe.pipeline.taskonomy import TaskonomyEncoder

    network = randomised(TaskonomyEncoder())
    for name, parameter in network.named_parameters():
        if name.endswith("bn3.weight"):
            parameter.data.mul_(0.05)
    nn.init.constant_(network.compress_bn.bias, 1.0)
    return network


TASKONOMY = ("autoencoding", "keypoints3d", "segment-unsup25d")


@pytest.mark.parametrize(
    "task", ["depth-zbuffer", *(pytest.param(name, marks=pytest.mark.slow) for name in TASKONOMY)]
)
def test_taskonomy_equals_a_float64_reference(tmp_path: Path, task: str) -> None:
    name, state = f"taskonomy-{task}", taskonomy_encoder().state_dict()
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "w.pth")
    theirs = reference_taskonomy(state, pixels_for(name))
    assert pixels_for(name).min() == -1
    assert pixels_for(name).max() == 1
    assert relative_error(embed_with(name, tmp_path / "w.pth"), theirs.flatten(1)) < 1e-5
    assert relative_error(embed_with(name, tmp_path / "w.pth", pooling="conv-map"), theirs) < 1e-5


#: padding, dilation, batch norm, ReLU
R2D2_CONVOLUTIONS = (
    *[(1, 1, True, True)] * 3,
    *[(2, 2, True, True)] * 2,
    (4, 4, True, True),
    (2, 4, True, False),
    (4, 8, True, False),
    (8, 16, False, False),
)


def reference_r2d2(state: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Descriptors of all keypoints, best first, and their scores, of one frame: naver/r2d2, extract.py."""
    state = {name: value.double() for name, value in state.items()}
    x, op = pixels[None].double(), 0
    for padding, dilation, norm, relu in R2D2_CONVOLUTIONS:
        x = F.conv2d(
            x, state[f"ops.{op}.weight"], state[f"ops.{op}.bias"], padding=padding, dilation=dilation
        )
        op += 1
        if norm:
            mean, var = (state[f"ops.{op}.running_{n}"].view(1, -1, 1, 1) for n in ("mean", "var"))
            x, op = (x - mean) / (var + 1e-5).sqrt(), op + 1
        if relu:
            x, op = x.relu(), op + 1
    reliability = F.conv2d(x**2, state["clf.weight"], state["clf.bias"]).softmax(dim=1)[0, 1]
    u = F.softplus(F.conv2d(x**2, state["sal.weight"], state["sal.bias"]))[0, 0]
    repeatability, descriptors = u / (1 + u), F.normalize(x, dim=1)[0]
    found = []
    for i in range(repeatability.shape[0]):
        for j in range(repeatability.shape[1]):
            rep, rel = repeatability[i, j], reliability[i, j]
            window = repeatability[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            if rep >= 0.7 and rel >= 0.7 and rep == window.max():
                found.append((float(rep * rel), descriptors[:, i, j]))
    found.sort(key=lambda pair: -pair[0])
    return torch.stack([d for _, d in found]), torch.tensor([s for s, _ in found])


def confident_r2d2(file: Path) -> nn.Module:
    """The network in the authors' layout; with random weights alone it would find no keypoint."""
    from pvrpipe.pipeline.r2d2 import R2D2

    network = randomised(R2D2(8))
    nn.init.constant_(network.sal.bias, 3.0)
    nn.init.constant_(network.clf.bias, 0.0)
    network.clf.bias.data[1] = 1.0
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"net": "Quad_L2Net_ConfCFS()", "state_dict": state}, file)
    return network


def test_r2d2_keeps_the_descriptors_of_the_best_keypoints(tmp_path: Path) -> None:
    network = confident_r2d2(tmp_path / "w.pt")
    rows = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), np.uint8)
    encoder = encoder_with("r2d2", tmp_path / "w.pt", size=64)
    theirs, scores = reference_r2d2(network.state_dict(), pixels_of(encoder, rows)[0])
    assert len(scores) > 8
    assert (scores[:8] - scores[1:9]).min() > 1e-6  # so that the order is no question of rounding
    ours = embed_with("r2d2", tmp_path / "w.pt", rows, size=64)
    assert encoder.identity.shape == (8, 128)
    assert relative_error(ours[0], theirs[:8]) < 1e-5
    np.testing.assert_allclose(np.linalg.norm(ours[0], axis=1), 1, rtol=1e-5)


def test_r2d2_finds_the_same_keypoints_in_bfloat16(tmp_path: Path) -> None:
    """Its confidences would tie there, and neighbours of a peak be peaks."""
    confident_r2d2(tmp_path / "w.pt")
    rows = np.random.default_rng(1).integers(0, 256, (4, 96, 96, 3), np.uint8)
    exact, rounded = (
        Encoder(
            EncoderRequest("r2d2", str(tmp_path / "w.pt"), precision, "cpu", 4, readout=Readout(size=96))
        )(rows)
        for precision in PRECISIONS
    )
    alike = exact @ rounded.transpose(0, 2, 1)
    assert (alike.max(axis=2) > 0.99).sum() >= 30  # of 32


def test_a_frame_without_keypoints_has_zeros(tmp_path: Path) -> None:
    encoder = Encoder(EncoderRequest("r2d2", "random:0", device="cpu", batch=1))
    flat = np.zeros((1, 256, 256, 3), np.uint8)
    embedding = encoder(flat)
    assert embedding.shape == (1, 8, 128)
    assert np.isfinite(embedding).all()
