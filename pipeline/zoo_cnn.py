"""Convolutional representations: ImageNet, PIE-G, R3M, VIP, MoCo, Taskonomy, R2D2."""

from __future__ import annotations

from pvrpipe.pipeline.pvrs import (
    HALF,
    IMAGENET,
    RESNET_RECIPE,
    KeyMap,
    Properties,
    Pvr,
    WeightsSource,
    recipe,
)

#: Only random weights see this; it is the default of torchvision.
TORCHVISION: dict[str, int | float | str | bool] = {"zero_init_last": False}
S3 = "https://pytorch.s3.amazonaws.com/models/rl"  # the stable copy that TorchRL uses
PUBLIC = "https://dl.fbaipublicfiles.com"
VISUAL_PRIOR = "https://github.com/alexsax/visual-prior/raw/networks/assets/pytorch"


def _resnet(depth: int, revision: str, sha256: str, width: int) -> Pvr:
    return Pvr(
        name=f"resnet{depth}",
        title=f"ResNet-{depth}, ImageNet-1k",
        source=WeightsSource(
            repo=f"timm/resnet{depth}.tv_in1k", revision=revision, file="model.safetensors", sha256=sha256
        ),
        architecture=f"resnet{depth}",
        overrides=TORCHVISION,
        keys=KeyMap(drop=(r"^fc\.",)),
        recipe=RESNET_RECIPE,
        pooling="average",
        width=width,
        licence="BSD-3-Clause",
        properties=Properties(trained_on="ImageNet-1k, labels"),
    )


RESNETS = {
    18: _resnet(
        18,
        "bbd144b3e5565108aad885f145491d11bc6ce807",
        "694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
        512,
    ),
    34: _resnet(
        34,
        "1b7b21cca82ff974d341713f777bf740c2db38c4",
        "0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235",
        512,
    ),
    50: _resnet(
        50,
        "78f3ecfdb38e06d9b8397f662e7ab8fee96026fa",
        "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
        2048,
    ),
}

#: PIE-G's encoder in evaluation mode; the paper's runs with the statistics of the batch (docs/pvrs.md).
PIEG = RESNETS[18].model_copy(
    update={
        "name": "pieg",
        "title": "PIE-G, ResNet-18 up to layer2",
        "recipe": recipe(None, "bilinear", {"mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0)}, crop=None),
        "layer": "layer2",
        "pooling": "conv-map",
        "width": 128,
    }
)


def _r3m(depth: int, width: int) -> Pvr:
    return Pvr(
        name=f"r3m-{depth}",
        title=f"R3M ResNet-{depth}",
        source=WeightsSource(
            url=f"{S3}/r3m/r3m_{depth}.pt",
            file=f"r3m_{depth}.pt",
            note="TorchRL's copy; its authors' own is on Google Drive only, and works as a file",
        ),
        architecture=f"resnet{depth}",
        overrides=TORCHVISION,
        keys=KeyMap(
            under="r3m",
            drop=(r"^module\.lang_(enc|rew)\.", r"\.fc\."),
            rename=((r"^module\.convnet\.", ""),),
        ),
        recipe=RESNET_RECIPE,
        pooling="average",
        width=width,
        licence="MIT",
        properties=Properties(trained_on="Ego4D with narrations", language=True, sequential=True),
    )


VIP = Pvr(
    name="vip",
    title="VIP ResNet-50",
    source=WeightsSource(url=f"{S3}/vip/model.pt", file="model.pt"),
    architecture="resnet50",
    overrides={**TORCHVISION, "num_classes": 1024},
    keys=KeyMap(under="vip", rename=((r"^module\.convnet\.", ""),)),
    recipe=RESNET_RECIPE,
    pooling="projected",
    width=1024,
    licence="CC-BY-NC-4.0",
    properties=Properties(trained_on="Ego4D", sequential=True),
)

MOCO_V2 = Pvr(
    name="mocov2",
    title="MoCo v2 ResNet-50, 800 epochs",
    source=WeightsSource(
        url=f"{PUBLIC}/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        file="moco_v2_800ep_pretrain.pth.tar",
        md5="a04e12f8",
    ),
    architecture="resnet50",
    overrides=TORCHVISION,
    keys=KeyMap(
        under="state_dict",
        drop=(r"^module\.encoder_k\.", r"^module\.queue", r"^module\.encoder_q\.fc\."),
        rename=((r"^module\.encoder_q\.", ""),),
    ),
    recipe=RESNET_RECIPE,
    pooling="average",
    width=2048,
    licence="CC-BY-NC-4.0",
    properties=Properties(trained_on="ImageNet-1k, contrastive"),
)

MOCO_V3_KEYS = KeyMap(
    under="state_dict",
    drop=(
        r"^module\.momentum_encoder\.",
        r"^module\.predictor\.",
        r"^module\.base_encoder\.(head|fc)\.",
    ),
    rename=((r"^module\.base_encoder\.", ""),),
)

MOCO_V3_RESNET = Pvr(
    name="mocov3-rn50",
    title="MoCo v3 ResNet-50, 1000 epochs",
    source=WeightsSource(url=f"{PUBLIC}/moco-v3/r-50-1000ep/r-50-1000ep.pth.tar", file="r-50-1000ep.pth.tar"),
    architecture="resnet50",
    overrides=TORCHVISION,
    keys=MOCO_V3_KEYS,
    recipe=RESNET_RECIPE,
    pooling="average",
    width=2048,
    licence="CC-BY-NC-4.0",
    properties=Properties(trained_on="ImageNet-1k, contrastive"),
)


def _taskonomy(task: str, title: str, sha256: str) -> Pvr:
    file = f"{task}_encoder-{sha256}.pth"
    return Pvr(
        name=f"taskonomy-{task.replace('_', '-')}",
        title=f"Taskonomy, {title}",
        source=WeightsSource(url=f"{VISUAL_PRIOR}/{file}", file=file, sha256=sha256),
        architecture="taskonomy",
        keys=KeyMap(under="state_dict"),
        recipe=recipe(256, "bilinear", HALF, crop=256, squash=True),
        pooling="flat",
        width=2048,
        licence="MIT",
        properties=Properties(trained_on="Taskonomy's indoor scenes"),
    )


TASKONOMY = (
    _taskonomy(
        "autoencoding", "autoencoding", "e35146c09253720e97c0a7f8ee4e896ac931f5faa1449df003d81e6089ac6307"
    ),
    _taskonomy(
        "keypoints3d", "3D keypoints", "7e3f1ec97b82ae30030b7ea4fec2dc606b71497d8c0335d05f0be3dc909d000d"
    ),
    _taskonomy(
        "segment_unsup25d",
        "2.5D segmentation",
        "7d12d2500c18c003ffc23943214f5dfd74932f0e3d03dde2c3a81ebc406e31a0",
    ),
    _taskonomy(
        "depth_zbuffer", "z-depth", "cc343a8ed622fd7ee3ce54398be8682bbbbfb5d11fa80e8d03a56a5ae4e11b09"
    ),
)

R2D2 = Pvr(
    name="r2d2",
    title="R2D2, descriptors of the 8 best keypoints",
    source=WeightsSource(
        url="https://github.com/naver/r2d2/raw/master/models/r2d2_WASF_N16.pt", file="r2d2_WASF_N16.pt"
    ),
    architecture="r2d2",
    overrides={"keypoints": 8},
    keys=KeyMap(under="state_dict", rename=((r"^module\.", ""),)),
    recipe=recipe(256, "bilinear", IMAGENET, crop=256),
    pooling="keypoints",
    width=128,
    licence="CC-BY-NC-SA-3.0",
    properties=Properties(trained_on="web images and Aachen, self-supervised matching"),
)

CNN_PVRS = (
    *RESNETS.values(),
    PIEG,
    _r3m(18, 512),
    _r3m(34, 512),
    _r3m(50, 2048),
    VIP,
    MOCO_V2,
    MOCO_V3_RESNET,
    *TASKONOMY,
    R2D2,
)
