"""The frozen pre-trained visual representations, as data: where the weights are, and how they are used.

Facts and pitfalls of each are in docs/pvrs.md. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from pvrpipe.schemas.errors import UnknownNameError, WeightsError
from pvrpipe.schemas.manifest import Frozen, Recipe

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
SPEC_FILE = "pvr.json"  # what makes a folder an encoder of one's own
WEIGHTS_FILE = "encoder.safetensors"


class WeightsSource(Frozen):
    """A file on the Hugging Face Hub at a pinned revision, at an address, or beside its ``pvr.json``."""

    repo: str | None = None
    revision: str | None = None
    url: str | None = None
    file: str
    sha256: str | None = None


class KeyMap(Frozen):
    """From the names in a checkpoint to those of our network, in this order.

    ``under``: the entry that holds the tensors, where there is one. ``drop``: tensors that belong to
    other parts of the upstream model. ``rename``: regular expressions, applied one after another.
    Separate q, k, v are then joined to the qkv that timm uses, and leading axes of one are added.
    """

    under: str | None = None
    drop: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()


class Pvr(Frozen):
    """One representation."""

    name: str
    title: str
    source: WeightsSource
    architecture: str  # a timm name, or "conv-autoencoder"
    overrides: dict[str, int | float | str | bool] = Field(default_factory=dict)
    keys: KeyMap = KeyMap()
    positions: Literal["dinov2-hub"] | None = None
    projection: int | None = None  # width after a linear map without bias, as CLIP has
    recipe: Recipe
    pooling: Literal["cls", "average", "projected", "flat"]
    width: int
    licence: str


def _recipe(
    resize: int, interpolation: Literal["bilinear", "bicubic"], values: Mapping[str, tuple[float, ...]]
) -> Recipe:
    return Recipe.model_validate(
        {"resize": resize, "interpolation": interpolation, "antialias": True, "crop": 224, **values}
    )


VIT_RECIPE = _recipe(256, "bicubic", IMAGENET)
RESNET_RECIPE = _recipe(256, "bilinear", IMAGENET)

#: A full MAE checkpoint: the decoder and the mask token are not part of the encoder.
MAE_KEYS = KeyMap(under="model", drop=(r"^decoder", r"^mask_token$"))

#: transformers' layout of DINOv2, and the original one, to timm's.
DINOV2_KEYS = KeyMap(
    drop=(r"mask_token$",),
    rename=(
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.layer\.", "blocks."),
        (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attn.\1."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
    ),
)

#: transformers' layout of CLIP, vision tower and projection only, to timm's.
CLIP_KEYS = KeyMap(
    drop=(r"^text_model\.", r"^text_projection\.", r"^logit_scale$", r"\.position_ids$"),
    rename=(
        (r"^visual_projection\.", "head."),
        (r"^vision_model\.embeddings\.class_embedding$", "cls_token"),
        (r"^vision_model\.embeddings\.position_embedding\.weight$", "pos_embed"),
        (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
        (r"^vision_model\.pre_layrnorm\.", "norm_pre."),
        (r"^vision_model\.post_layernorm\.", "norm."),
        (r"^vision_model\.encoder\.layers\.", "blocks."),
        (r"\.self_attn\.(q|k|v)_proj\.", r".attn.\1."),
        (r"\.self_attn\.out_proj\.", ".attn.proj."),
        (r"\.layer_norm([12])\.", r".norm\1."),
    ),
)


def _vc1(name: str, title: str, repo: str, revision: str, sha256: str, size: str, width: int) -> Pvr:
    return Pvr(
        name=name,
        title=title,
        source=WeightsSource(repo=repo, revision=revision, file="pytorch_model.bin", sha256=sha256),
        architecture=f"vit_{size}_patch16_224",
        keys=MAE_KEYS,
        recipe=VIT_RECIPE,
        pooling="cls",
        width=width,
        licence="CC-BY-NC-4.0",
    )


def _dinov2(letter: str, size: str, revision: str, sha256: str, width: int) -> Pvr:
    return Pvr(
        name=f"dinov2-{letter}",
        title=f"DINOv2 ViT-{letter.upper()}/14",
        source=WeightsSource(
            repo=f"facebook/dinov2-{size}", revision=revision, file="model.safetensors", sha256=sha256
        ),
        architecture=f"vit_{size}_patch14_dinov2",
        overrides={"img_size": 224},
        keys=DINOV2_KEYS,
        positions="dinov2-hub",
        recipe=VIT_RECIPE,
        pooling="cls",
        width=width,
        licence="Apache-2.0",
    )


def _resnet(depth: int, revision: str, sha256: str, width: int) -> Pvr:
    return Pvr(
        name=f"resnet{depth}",
        title=f"ResNet-{depth}, ImageNet-1k",
        source=WeightsSource(
            repo=f"timm/resnet{depth}.tv_in1k", revision=revision, file="model.safetensors", sha256=sha256
        ),
        architecture=f"resnet{depth}",
        overrides={"zero_init_last": False},  # only random weights see this; torchvision's default
        keys=KeyMap(drop=(r"^fc\.",)),
        recipe=RESNET_RECIPE,
        pooling="average",
        width=width,
        licence="BSD-3-Clause",
    )


PVRS: dict[str, Pvr] = {
    pvr.name: pvr
    for pvr in (
        _vc1(
            "vc1",
            "VC-1 ViT-B/16",
            "facebook/vc1-base",
            "413569a9eaa7272995c99bda25fe518816455e8c",
            "1321150ee7e45c5c1a8ea2bb6181cce87841f87f94ec69f0a451cfe4a63b77ba",
            "base",
            768,
        ),
        _vc1(
            "vc1-l",
            "VC-1 ViT-L/16",
            "facebook/vc1-large",
            "8a47f311ef3a8e0b3f58e4249700c9c5b36012c9",
            "89d59b6e0fe627ee13dd49011d9e3178fc5749237b3963608213ba210257d79a",
            "large",
            1024,
        ),
        _dinov2(
            "s",
            "small",
            "ed25f3a31f01632728cabb09d1542f84ab7b0056",
            "ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
            384,
        ),
        _dinov2(
            "b",
            "base",
            "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
            "d73036b56966966d07975d696bde331762f37297e2f095de8cea0040c3aa0841",
            768,
        ),
        _dinov2(
            "l",
            "large",
            "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
            "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
            1024,
        ),
        Pvr(
            name="clip-l14",
            title="CLIP ViT-L/14 (OpenAI)",
            source=WeightsSource(
                repo="openai/clip-vit-large-patch14",
                revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
                file="model.safetensors",
                sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
            ),
            architecture="vit_large_patch14_clip_quickgelu_224",
            keys=CLIP_KEYS,
            projection=768,
            recipe=_recipe(224, "bicubic", CLIP),
            pooling="projected",
            width=768,
            licence="MIT",
        ),
        Pvr(
            name="r3m-50",
            title="R3M ResNet-50",
            # The authors' own file is on Google Drive only; this is the stable copy that TorchRL uses.
            source=WeightsSource(
                url="https://pytorch.s3.amazonaws.com/models/rl/r3m/r3m_50.pt", file="r3m_50.pt"
            ),
            architecture="resnet50",
            overrides={"zero_init_last": False},
            keys=KeyMap(
                under="r3m",
                drop=(r"^module\.lang_(enc|rew)\.", r"\.fc\."),
                rename=((r"^module\.convnet\.", ""),),
            ),
            recipe=RESNET_RECIPE,
            pooling="average",
            width=2048,
            licence="MIT",
        ),
        _resnet(
            18,
            "bbd144b3e5565108aad885f145491d11bc6ce807",
            "694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
            512,
        ),
        _resnet(
            50,
            "78f3ecfdb38e06d9b8397f662e7ab8fee96026fa",
            "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
            2048,
        ),
    )
}


def find_pvr(name: str) -> Pvr:
    """A representation by name, or one's own by the path of a folder with a ``pvr.json``.

    Raises:
        UnknownNameError: there is neither; the message names the nearest.
        WeightsError: the folder's ``pvr.json`` is not valid.
    """
    if name in PVRS:
        return PVRS[name]
    path = Path(name)
    if not (path / SPEC_FILE).is_file():
        hint = f"or the path of a folder with a {SPEC_FILE}, as `pvrpipe pretrain autoencoder` makes"
        raise UnknownNameError.among("PVR", name, PVRS, hint=hint)
    try:
        return Pvr.model_validate_json((path / SPEC_FILE).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WeightsError(
            f"{path / SPEC_FILE}: {where}: {first['msg']}; make the folder again with `pvrpipe pretrain`"
        ) from None
