"""Representations that learned from images with text: CLIP, OpenCLIP, SigLIP, LIV."""

from __future__ import annotations

from pvrpipe.pipeline.pvrs import CLIP, HALF, KeyMap, Properties, Pvr, WeightsSource, recipe

#: transformers' layout of CLIP, vision tower and projection only, to timm's; a tower alone has no prefix.
CLIP_KEYS = KeyMap(
    drop=(r"^text_model\.", r"^text_projection\.", r"^logit_scale$", r"\.position_ids$"),
    rename=(
        (r"^visual_projection\.", "head."),
        (r"^(?:vision_model\.)?embeddings\.class_embedding$", "cls_token"),
        (r"^(?:vision_model\.)?embeddings\.position_embedding\.weight$", "pos_embed"),
        (r"^(?:vision_model\.)?embeddings\.patch_embedding\.", "patch_embed.proj."),
        (r"^(?:vision_model\.)?pre_layrnorm\.", "norm_pre."),
        (r"^(?:vision_model\.)?post_layernorm\.", "norm."),
        (r"^(?:vision_model\.)?encoder\.layers\.", "blocks."),
        (r"\.self_attn\.(q|k|v)_proj\.", r".attn.\1."),
        (r"\.self_attn\.out_proj\.", ".attn.proj."),
        (r"\.layer_norm([12])\.", r".norm\1."),
    ),
)

#: The text tower and its scale, in the layout of OpenAI's CLIP, which open_clip keeps.
OPENAI_TEXT = (
    r"^(?:module\.model\.)?(transformer|token_embedding|ln_final)\.",
    r"^(?:module\.model\.)?(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)$",
    r"^(input_resolution|context_length|vocab_size)$",
)

OPEN_CLIP_KEYS = KeyMap(
    drop=OPENAI_TEXT,
    rename=(
        (r"^visual\.class_embedding$", "cls_token"),
        (r"^visual\.positional_embedding$", "pos_embed"),
        (r"^visual\.proj$", "head.weight"),
        (r"^visual\.conv1\.", "patch_embed.proj."),
        (r"^visual\.ln_pre\.", "norm_pre."),
        (r"^visual\.ln_post\.", "norm."),
        (r"^visual\.transformer\.resblocks\.", "blocks."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    ),
    transpose=(r"^head\.weight$",),
)

#: OpenAI's ResNets to timm's; names that are timm's already stay as they are.
CLIP_RESNET_KEYS = KeyMap(
    drop=OPENAI_TEXT,
    rename=(
        (r"^(?:module\.model\.)?visual\.", ""),
        (r"^conv([123])\.", r"stem.conv\1.conv."),
        (r"^bn([123])\.", r"stem.conv\1.bn."),
        (r"^layer1\.", "stages.0."),
        (r"^layer2\.", "stages.1."),
        (r"^layer3\.", "stages.2."),
        (r"^layer4\.", "stages.3."),
        (r"^(stages\.\d+\.\d+)\.conv([13])\.", r"\1.conv\2_1x1.conv."),
        (r"^(stages\.\d+\.\d+)\.conv2\.", r"\1.conv2_kxk.conv."),
        (r"^(stages\.\d+\.\d+)\.bn([13])\.", r"\1.conv\2_1x1.bn."),
        (r"^(stages\.\d+\.\d+)\.bn2\.", r"\1.conv2_kxk.bn."),
        (r"\.downsample\.0\.", ".shortcut.conv.conv."),
        (r"\.downsample\.1\.", ".shortcut.conv.bn."),
        (r"^attnpool\.positional_embedding$", "head.pos_embed"),
        (r"^attnpool\.([qkv])_proj\.", r"head.\1."),
        (r"^attnpool\.c_proj\.", "head.proj."),
    ),
)

SIGLIP_KEYS = KeyMap(
    drop=(r"^text_model\.", r"^logit_(scale|bias)$", r"\.position_ids$"),
    rename=(
        (r"^(?:vision_model\.)?embeddings\.patch_embedding\.", "patch_embed.proj."),
        (r"^(?:vision_model\.)?embeddings\.position_embedding\.weight$", "pos_embed"),
        (r"^(?:vision_model\.)?encoder\.layers\.", "blocks."),
        (r"^(?:vision_model\.)?post_layernorm\.", "norm."),
        (r"^(?:vision_model\.)?head\.probe$", "attn_pool.latent"),
        (r"^(?:vision_model\.)?head\.attention\.in_proj_(weight|bias)$", r"attn_pool.q+kv.\1"),
        (r"^(?:vision_model\.)?head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"^(?:vision_model\.)?head\.layernorm\.", "attn_pool.norm."),
        (r"^(?:vision_model\.)?head\.mlp\.", "attn_pool.mlp."),
        (r"\.self_attn\.(q|k|v)_proj\.", r".attn.\1."),
        (r"\.self_attn\.out_proj\.", ".attn.proj."),
        (r"\.layer_norm([12])\.", r".norm\1."),
    ),
)


def _clip(letter: str, size: str, patch: int, source: WeightsSource, width: int) -> Pvr:
    return Pvr(
        name=f"clip-{letter}{patch}",
        title=f"CLIP ViT-{letter.upper()}/{patch} (OpenAI)",
        source=source,
        architecture=f"vit_{size}_patch{patch}_clip_quickgelu_224",
        overrides={"img_size": 224},
        keys=CLIP_KEYS,
        projection=width,
        recipe=recipe(224, "bicubic", CLIP),
        pooling="projected",
        width=width,
        licence="MIT",
        properties=Properties(trained_on="400 M images with text", language=True, diverse=True),
    )


def _clip_resnet(name: str, title: str, source: WeightsSource, pixels: int) -> Pvr:
    return Pvr(
        name=f"clip-{name}",
        title=f"CLIP {title} (OpenAI)",
        source=source,
        architecture=f"resnet{name.removeprefix('rn')}_clip",
        overrides={"num_classes": 1024, "img_size": pixels},
        keys=CLIP_RESNET_KEYS,
        recipe=recipe(pixels, "bicubic", CLIP, crop=pixels),
        pooling="map",
        width=1024,
        licence="MIT",
        properties=Properties(trained_on="400 M images with text", language=True, diverse=True),
    )


def _siglip(name: str, title: str, source: WeightsSource, architecture: str, width: int, version: int) -> Pvr:
    return Pvr(
        name=name,
        title=title,
        source=source,
        architecture=architecture,
        overrides={
            "img_size": 224,
            "act_layer": "gelu_tanh",
        },  # flax's gelu, as big_vision has it; timm's is exact
        keys=SIGLIP_KEYS,
        recipe=recipe(224, "bicubic" if version == 1 else "bilinear", HALF, squash=True),
        pooling="map",
        width=width,
        licence="Apache-2.0",
        properties=Properties(trained_on="WebLI images with text", language=True, diverse=True),
    )


LANGUAGE_PVRS = (
    _clip(
        "b",
        "base",
        32,
        WeightsSource(
            repo="openai/clip-vit-base-patch32",
            revision="3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
            file="pytorch_model.bin",
        ),
        512,
    ),
    _clip(
        "b",
        "base",
        16,
        WeightsSource(
            repo="openai/clip-vit-base-patch16",
            revision="57c216476eefef5ab752ec549e440a49ae4ae5f3",
            file="pytorch_model.bin",
        ),
        512,
    ),
    _clip(
        "l",
        "large",
        14,
        WeightsSource(
            repo="openai/clip-vit-large-patch14",
            revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
            file="model.safetensors",
            sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        ),
        768,
    ),
    _clip_resnet(
        "rn50",
        "ResNet-50",
        WeightsSource(
            repo="timm/resnet50_clip.openai",
            revision="ec3d92cf63a5f9d591f0d611b736895966c73076",
            file="open_clip_pytorch_model.bin",
        ),
        224,
    ),
    _clip_resnet(
        "rn50x64",
        "ResNet-50x64",
        WeightsSource(repo="timm/resnet50x64_clip.openai", file="model.safetensors"),
        448,
    ),
    Pvr(
        name="openclip-h",
        title="OpenCLIP ViT-H/14, LAION-2B; the frozen image tower of ImageBind",
        source=WeightsSource(
            repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            revision="1c2b8495b28150b8a4922ee1c8edee224c284c0c",
            file="open_clip_model.safetensors",
        ),
        architecture="vit_huge_patch14_clip_224",
        overrides={"img_size": 224},
        keys=OPEN_CLIP_KEYS,
        projection=1024,
        recipe=recipe(224, "bicubic", CLIP),
        pooling="projected",
        width=1024,
        licence="MIT",
        properties=Properties(trained_on="LAION-2B images with text", language=True, diverse=True),
    ),
    _siglip(
        "siglip-b16",
        "SigLIP ViT-B/16",
        WeightsSource(
            repo="google/siglip-base-patch16-224",
            revision="78005bda866f09e7de6e72746ec272d03d9793d1",
            file="model.safetensors",
        ),
        "vit_base_patch16_siglip_224",
        768,
        1,
    ),
    _siglip(
        "siglip-so400m",
        "SigLIP SoViT-400m/14",
        WeightsSource(
            repo="google/siglip-so400m-patch14-224",
            revision="d04cf29fca7b6374f74d8bea1969314492266b5e",
            file="model.safetensors",
        ),
        "vit_so400m_patch14_siglip_224",
        1152,
        1,
    ),
    _siglip(
        "siglip2-b16",
        "SigLIP 2 ViT-B/16",
        WeightsSource(
            repo="google/siglip2-base-patch16-224",
            revision="75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2",
            file="model.safetensors",
        ),
        "vit_base_patch16_siglip_224",
        768,
        2,
    ),
    Pvr(
        name="liv",
        title="LIV, CLIP's ResNet-50 on videos",
        source=WeightsSource(
            repo="jasonyma/LIV",
            revision="5a29adb8f796b0f91fdd9bc284b31a1829c1eb91",
            file="model.pt",
            sha256="0387b1ce397ffc67c03e0945ce3ecce1dc037191ea7e680a721618e6fed1bc1c",
        ),
        architecture="resnet50_clip",
        overrides={"num_classes": 1024, "img_size": 224},
        keys=CLIP_RESNET_KEYS.model_copy(update={"under": "liv"}),
        recipe=recipe(224, "bilinear", CLIP, antialias=False, rounded=False),
        pooling="map",
        width=1024,
        licence="MIT",
        properties=Properties(
            trained_on="EpicKitchens with narrations, from CLIP", language=True, sequential=True
        ),
    ),
)
