"""How a store was made: everything that decides its bytes, as the manifest holds it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Frozen(BaseModel):
    """Immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


IMPORTED = "imported"  # the policy of rollouts that others recorded


class RolloutSpecification(Frozen):
    """Everything that decides the bytes of a rollout store."""

    kind: Literal["rollouts"] = "rollouts"
    environment: str
    size: int
    camera: int | str
    action_repeat: int
    episodes: int
    max_steps: int
    policy: str
    seed: int
    control_timestep: float  # seconds between two rows, action repeat included
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    discrete: bool = False  # actions are one-hot: one of A
    state_names: tuple[str, ...]
    renderer: str
    versions: dict[str, str]
    variation: str = "none"  # how the look of episodes is drawn, by the grammar of rollouts/variation.py
    replay_of: Sha256 | None = None  # the store whose episodes these are, seen anew

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        """Every action has both bounds, infinite ones where it has none."""
        if not self.action_low or len(self.action_low) != len(self.action_high):
            raise ValueError("action_low and action_high are not as many as each other")
        return self


class Recipe(Frozen):
    """How uint8 frames become the input of a network.

    The frame's shortest side goes to ``resize`` pixels (None: the frame is taken as it is), or with
    ``squash`` both sides do; the middle ``crop`` pixels are cut out (None: nothing is), values go to [0, 1]
    and are normalised by ``mean`` and ``std``. ``rounded``: to 8 bits after each axis, as PIL resizes images;
    otherwise in floating point, as torchvision resizes tensors.
    """

    resize: int | None
    interpolation: Literal["bilinear", "bicubic"]
    antialias: bool
    crop: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    squash: bool = False
    rounded: bool = True
    backend: str = "torch"


class WeightsIdentity(Frozen):
    """Which tensors an encoder holds, and where they came from."""

    source: str
    revision: str | None
    file: str | None
    file_sha256: Sha256 | None
    tensors_sha256: Sha256
    loaded: int
    expected: int
    random_seed: int | None  # not None: nobody trained these weights
    licence: str


class EncoderIdentity(Frozen):
    """What computes an embedding: two stores hold the same representation if and only if this is equal."""

    name: str
    title: str
    architecture: str
    overrides: dict[str, int | float | str | bool]
    positions: str | None  # how position embeddings were resampled
    weights: WeightsIdentity
    recipe: Recipe
    layer: str  # "last", or the blocks or stages whose outputs are joined along the features
    blocks: tuple[int, ...] | None  # the transformer blocks that compute, by their numbers upstream
    final_norm: bool
    pooling: str
    shape: tuple[int, ...]


class Tuning(Frozen):
    """An encoder that is a part of a model: how it was asked for, and how much of it learns with the model."""

    pvr: str
    weights: str
    unfreeze: str  # the number of its last blocks or stages, or "all"


class Computation(Frozen):
    """How an embedding was computed: it decides the last bits, not the meaning."""

    precision: Literal["fp32", "bf16"]
    device: str
    threads: int | None  # of one worker, on a CPU
    batch: int  # frames; a shard for which memory did not suffice has its own
    compiled: bool = Field(default=False, exclude_if=lambda compiled: not compiled)  # by torch.compile
    resizing: Literal["torch", "triton"] = Field(
        default="torch", exclude_if=lambda kernels: kernels == "torch"
    )


class EmbeddingSpecification(Frozen):
    """Everything that decides the bytes of an embedding store."""

    kind: Literal["embeddings"] = "embeddings"
    rollouts_id: Sha256
    rollouts: RolloutSpecification
    encoder: EncoderIdentity
    computation: Computation
    dtype: Literal["float16", "float32"]
    versions: dict[str, str]


Specification = Annotated[RolloutSpecification | EmbeddingSpecification, Field(discriminator="kind")]
