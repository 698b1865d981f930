"""Vision transformers: VC-1, MAE, MVP, MoCo v3, DINOv2 and v3, I-JEPA, V-JEPA 2, Theia, RADIO."""

from __future__ import annotations

from collections.abc import Mapping

from pvrpipe.pipeline.pvrs import (
    CLIP,
    IMAGENET,
    RESNET_RECIPE,
    VIT_RECIPE,
    KeyMap,
    Properties,
    Pvr,
    WeightsSource,
    recipe,
)
from pvrpipe.pipeline.zoo_cnn import MOCO_V3_KEYS, PUBLIC

#: A full MAE checkpoint: the decoder and the mask token are not part of the encoder.
MAE_KEYS = KeyMap(under="model", drop=(r"^decoder", r"^mask_token$"))

#: transformers' layouts of a plain ViT, of I-JEPA and of DINOv2, and the original ones, to timm's.
VIT_RENAMES = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.(?:weights_in|w12)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:weights_out|w3)\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
DINOV2_KEYS = KeyMap(drop=(r"mask_token$",), rename=VIT_RENAMES)

#: DINOv3 in transformers' layout, in Meta's, and in timm's own, to timm's with biases.
DINOV3_KEYS = KeyMap(
    drop=(r"mask_token$", r"\.bias_mask$", r"^rope_embed\.periods$"),
    rename=(
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^(?:embeddings\.register_tokens|storage_tokens)$", "reg_token"),
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^layer\.", "blocks."),
        (r"\.attn\.qkv\.bias$", ".attn.q-v_bias"),  # Meta masks the bias of k, which is 0
        (r"\.attention\.(q|v)_proj\.bias$", r".attn.\1_bias"),
        (r"\.attention\.(q|k|v)_proj\.weight$", r".attn.\1.weight"),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
        (r"\.ls([12])\.gamma$", r".gamma_\1"),
        (r"\.mlp\.(?:gate_proj|w1)\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.(?:down_proj|w3)\.", ".mlp.fc2."),
    ),
)

EGO4D_AND_MORE = Properties(trained_on="Ego4D, manipulation, navigation, ImageNet", diverse=True)
LVD = Properties(trained_on="LVD-142M, curated web images", diverse=True)


def _vit(
    name: str,
    title: str,
    size: str,
    source: WeightsSource,
    width: int,
    patch: int = 16,
    overrides: Mapping[str, object] | None = None,
    **others: object,
) -> Pvr:
    """A ViT of timm; where nothing else is said a plain one at 224 px, CLS after the final norm."""
    usual = {
        "architecture": f"vit_{size}_patch{patch}_224",
        "recipe": VIT_RECIPE,
        "pooling": "cls",
        "licence": "CC-BY-NC-4.0",
    }
    own = {"name": name, "title": title, "source": source, "width": width}
    return Pvr.model_validate({**own, **usual, "overrides": {"img_size": 224, **(overrides or {})}, **others})


def _vc1(
    name: str,
    title: str,
    repo: str,
    revision: str | None = None,
    sha256: str | None = None,
    licence: str = "CC-BY-NC-4.0",
) -> Pvr:
    size, width = ("base", 768) if name == "vc1" else ("large", 1024)
    source = WeightsSource(
        repo=f"facebook/{repo}", revision=revision, file="pytorch_model.bin", sha256=sha256
    )
    return _vit(name, title, size, source, width, keys=MAE_KEYS, properties=EGO4D_AND_MORE, licence=licence)


def _mae(letter: str, size: str, patch: int, width: int, md5: str) -> Pvr:
    file = f"mae_pretrain_vit_{size}.pth"
    return _vit(
        f"mae-{letter}",
        f"MAE ViT-{letter.upper()}/{patch}, ImageNet-1k",
        size,
        WeightsSource(url=f"{PUBLIC}/mae/pretrain/{file}", file=file, md5=md5),
        width,
        patch=patch,
        keys=MAE_KEYS,
        properties=Properties(trained_on="ImageNet-1k, masked"),
    )


def _mvp(letter: str, size: str, pixels: int, share: str, md5: str, width: int, data: str) -> Pvr:
    overrides: dict[str, object] = {"img_size": pixels}
    if letter == "s":
        overrides["num_heads"] = 12  # mvp/backbones/vit.py; timm's has 6, which loads and is another network
    return _vit(
        f"mvp-{letter}",
        f"MVP ViT-{letter.upper()}/16",
        size,
        WeightsSource(
            url=f"https://berkeley.box.com/shared/static/{share}.pth",
            file=f"mvp-{letter}.pth",
            md5=md5,
            note="a file store that may ask for a browser; the file works with --weights",
        ),
        width,
        overrides=overrides,
        keys=MAE_KEYS,
        recipe=recipe(pixels, "bilinear", IMAGENET, crop=pixels, antialias=False, rounded=False),
        licence="none stated",
        properties=Properties(trained_on=data, diverse=letter != "s"),
    )


def _mocov3(letter: str, size: str, width: int) -> Pvr:
    file = f"vit-{letter}-300ep.pth.tar"
    return _vit(
        f"mocov3-{letter}",
        f"MoCo v3 ViT-{letter.upper()}/16, 300 epochs",
        size,
        WeightsSource(url=f"{PUBLIC}/moco-v3/vit-{letter}-300ep/{file}", file=file),
        width,
        overrides={"num_heads": 12},  # facebookresearch/moco-v3: vits.py, of ViT-S too
        keys=MOCO_V3_KEYS,
        recipe=RESNET_RECIPE,
        properties=Properties(trained_on="ImageNet-1k, contrastive"),
    )


def _dinov2(letter: str, size: str, revision: str | None, sha256: str | None, width: int) -> Pvr:
    return _vit(
        f"dinov2-{letter}",
        f"DINOv2 ViT-{letter}/14" if letter == "g" else f"DINOv2 ViT-{letter.upper()}/14",
        size,
        WeightsSource(
            repo=f"facebook/dinov2-{size}", revision=revision, file="model.safetensors", sha256=sha256
        ),
        width,
        architecture=f"vit_{size}_patch14_dinov2",
        keys=DINOV2_KEYS,
        positions="dinov2-hub",
        licence="Apache-2.0",
        properties=LVD,
    )


def _dinov2_registers(letter: str, size: str, revision: str | None, width: int) -> Pvr:
    return _vit(
        f"dinov2-{letter}-reg",
        f"DINOv2 ViT-{letter if letter == 'g' else letter.upper()}/14 with registers",
        size,
        WeightsSource(
            repo=f"facebook/dinov2-with-registers-{size}", revision=revision, file="model.safetensors"
        ),
        width,
        architecture=f"vit_{size}_patch14_reg4_dinov2",
        keys=DINOV2_KEYS.model_copy(update={"fold_class_position": True}),
        positions="bicubic-antialias",
        licence="Apache-2.0",
        properties=LVD,
    )


def _dinov3(letter: str, size: str, width: int) -> Pvr:
    official = f"{letter[0]}16{'plus' if letter.endswith('+') else ''}"
    up = (r"\.mlp\.up_proj\.", ".mlp.fc1_x." if letter.endswith("+") else ".mlp.fc1.")
    return _vit(
        f"dinov3-{letter}",
        f"DINOv3 ViT-{letter.upper()}/16",
        size,
        WeightsSource(
            repo=f"timm/vit_{size}_patch16_dinov3_qkvb.lvd1689m",
            file="model.safetensors",
            note=f"a mirror; facebook/dinov3-vit{official}-pretrain-lvd1689m, and Meta's .pth, are behind a form",
        ),
        width,
        architecture=f"vit_{size}_patch16_dinov3_qkvb",
        overrides={"img_size": 256},
        keys=DINOV3_KEYS.model_copy(update={"rename": (*DINOV3_KEYS.rename, up)}),
        positions="rope-bf16",
        recipe=recipe(256, "bilinear", IMAGENET, crop=256, squash=True),
        licence="DINOv3",
        properties=Properties(trained_on="LVD-1689M, curated web images", diverse=True),
    )


def _theia(size: str, heads: int, width: int) -> Pvr:
    return _vit(
        f"theia-{size[0]}",
        f"Theia ViT-{size[0].upper()}/16 (cdiv)",
        size,
        WeightsSource(repo=f"theaiinstitute/theia-{size}-patch16-224-cdiv", file="model.safetensors"),
        width,
        overrides={"num_heads": heads, "layer_norm_eps": 1e-12},
        keys=KeyMap(drop=(r"^translator\.",), rename=((r"^backbone\.model\.", ""), *VIT_RENAMES)),
        recipe=recipe(256, "bicubic", IMAGENET, squash=True),
        pooling="patches",
        licence="Theia (non-commercial)",
        properties=Properties(
            trained_on="ImageNet-1k, distilled from CLIP, Depth Anything, DINOv2, ViT",
            language=True,
            diverse=True,
        ),
    )


IJEPA = _vit(
    "ijepa-h",
    "I-JEPA ViT-H/14, ImageNet-1k",
    "huge",
    WeightsSource(
        repo="facebook/ijepa_vith14_1k",
        revision="f157467ea509bc356ff9f61fd3c0d840eec5e04e",
        file="model.safetensors",
    ),
    1280,
    architecture="vit_huge_patch14_gap_224",
    keys=KeyMap(rename=VIT_RENAMES),
    pooling="mean",
    properties=Properties(trained_on="ImageNet-1k, masked in the embedding"),
)


def _vjepa2(letter: str, revision: str | None, width: int, depth: int, heads: int, ratio: float) -> Pvr:
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "mlp_ratio": ratio,
    }
    return Pvr(
        name=f"vjepa2-{letter}",
        title=f"V-JEPA 2 ViT-{letter if letter == 'g' else letter.upper()}/16, one frame",
        source=WeightsSource(
            repo=f"facebook/vjepa2-vit{letter}-fpc64-256", revision=revision, file="model.safetensors"
        ),
        architecture="vjepa2",
        overrides={**sizes, "crop_size": 256},
        keys=KeyMap(
            drop=(r"^predictor\.",),
            rename=(
                (r"^encoder\.embeddings\.", "embeddings."),
                (r"^encoder\.layer\.", "blocks."),
                (r"^encoder\.layernorm\.", "norm."),
            ),
        ),
        recipe=recipe(292, "bilinear", IMAGENET, crop=256),
        pooling="mean",
        width=width,
        licence="MIT" if letter != "g" else "Apache-2.0",
        properties=Properties(trained_on="videos, masked in the embedding", sequential=True, diverse=True),
    )


RADIO = Pvr(
    name="c-radio-v4-h",
    title="C-RADIOv4 ViT-H/16",
    source=WeightsSource(repo="nvidia/C-RADIOv4-H", file="model.safetensors"),
    architecture="radio",
    overrides={
        "img_size": 224,
        "width": 1280,
        "depth": 32,
        "heads": 16,
        "class_tokens": 3,
        "registers": 7,
        "summaries": "0,1",
    },
    keys=KeyMap(
        drop=(r"input_conditioner\.", r"summary_idxs$", r"\.video_embedder\."),
        rename=(
            (r"^radio_model\.model\.", ""),
            (r"^patch_generator\.embedder\.weight$", "patch_embed.weight"),
            (r"^patch_generator\.pos_embed$", "pos_embed"),
            (r"^patch_generator\.cls_token\.token$", "prefix"),
        ),
    ),
    positions="bilinear",
    recipe=recipe(224, "bilinear", CLIP, squash=True),
    pooling="summary",
    width=2560,
    licence="NVIDIA Open Model",
    properties=Properties(trained_on="distilled from SigLIP 2, DINOv3 and SAM", language=True, diverse=True),
)

VIT_PVRS = (
    _vc1(
        "vc1",
        "VC-1 ViT-B/16",
        "vc1-base",
        "413569a9eaa7272995c99bda25fe518816455e8c",
        "1321150ee7e45c5c1a8ea2bb6181cce87841f87f94ec69f0a451cfe4a63b77ba",
    ),
    _vc1(
        "vc1-l",
        "VC-1 ViT-L/16",
        "vc1-large",
        "8a47f311ef3a8e0b3f58e4249700c9c5b36012c9",
        "89d59b6e0fe627ee13dd49011d9e3178fc5749237b3963608213ba210257d79a",
    ),
    _vc1("vc1-l-permissive", "VC-1 ViT-L/16, permissive data", "vc1-large-permissive", licence="MIT"),
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
    _dinov2("g", "giant", "611a9d42f2335e0f921f1e313ad3c1b7178d206d", None, 1536),
    _dinov2_registers("s", "small", None, 384),
    _dinov2_registers("b", "base", None, 768),
    _dinov2_registers("l", "large", "e4c89a4e05589de9b3e188688a303d0f3c04d0f3", 1024),
    _dinov2_registers("g", "giant", "8d0d49f77fb8b5dd78842496ff14afe7dd4d85cb", 1536),
    _dinov3("s", "small", 384),
    _dinov3("s+", "small_plus", 384),
    _dinov3("b", "base", 768),
    _dinov3("l", "large", 1024),
    _dinov3("h+", "huge_plus", 1280),
    _mae("b", "base", 16, 768, "8cad7c"),
    _mae("l", "large", 16, 1024, "b8b06e"),
    _mae("h", "huge", 14, 1280, "9bdbb0"),
    _mvp(
        "s",
        "small",
        224,
        "m93ynem558jo8vltlads5rcmnahgsyzr",
        "fe6e30eb4256fae298ea0a6c6b4c1ae7",
        384,
        "videos of hands and objects",
    ),
    _mvp(
        "b",
        "base",
        224,
        "0ckepd2ja3pi570z89ogd899cn387yut",
        "526093597ac1dc55df618bcbdfe8da4a",
        768,
        "Ego4D, ImageNet, hands and objects",
    ),
    _mvp(
        "l",
        "large",
        256,
        "6p0pc47mlpp4hhwlin2hf035lxlgddxr",
        "5352b0b6c04f044f67eba41b667fcde6",
        1024,
        "Ego4D, ImageNet, hands and objects",
    ),
    _mocov3("s", "small", 384),
    _mocov3("b", "base", 768),
    IJEPA,
    _vjepa2("l", "b3c1679b7c34d3255ef3547f27c7b226aefab26f", 1024, 24, 16, 4.0),
    _vjepa2("h", "b5eac8703e3efdc1547fbb6ddfbeb133dc0bdee5", 1280, 32, 16, 4.0),
    _vjepa2("g", None, 1408, 40, 22, 48 / 11),
    _theia("tiny", 3, 192),
    _theia("small", 6, 384),
    _theia("base", 12, 768),
    RADIO,
)
