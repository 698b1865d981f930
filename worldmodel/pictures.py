"""What the report shows of a run besides numbers, in the run's folder: ``map.parquet`` and ``strip.parquet``.

Both are drawn where the run is, by whoever trained it, so that a report needs neither the model nor the frames.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from pvrpipe.store.files import write_whole
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.filmstrip import film_strip
from pvrpipe.worldmodel.maps import latent_map

ROWS = 400  # points of a map
POINT, MOMENT = 48, 64  # pixels of a side of their frames
QUALITY = 75  # of WebP, whose headers are small: half of a JPEG of this size would be tables
SEPARATION = "pvrpipe.separation"  # of the file's metadata


def draw(
    run: Path,
    frames: Path | str,
    *,
    rows: int = ROWS,
    context: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> None:
    """Write what is missing of a run's map and film strip.

    ``map.parquet`` has a row per point: ``episode``, ``step``, ``reward``, ``pca_x``, ``pca_y``, ``umap_x``, ``umap_y``
    and ``frame``, a WebP picture. ``strip.parquet`` has a row per moment: ``episode``, ``step``, the pictures ``true``,
    ``imagined`` and ``seen``, ``received`` and ``predicted`` reward, and ``distance``.

    Args:
        run: a finished run's folder.
        frames: the rollout store that its observations come from.
        rows: of held-out episodes on the map.
        context: rows seen before imagining.
        seed: decides the samples and the layout.
        device: where the model computes.
    """
    if not runs.is_sound(run / runs.MAP):
        _write_map(run, Store.open(frames), rows, seed, device)
    if not _has_strip(run, context):
        found = film_strip(run, str(frames), context=context, seed=seed, device=device)
        strip = pl.DataFrame(
            {
                "episode": np.full(len(found.step), found.episode),
                "step": found.step,
                **{
                    name: [webp(frame, MOMENT) for frame in getattr(found, name)]
                    for name in ("true", "imagined", "seen")
                },
                "received": found.reward[:, 0],
                "predicted": found.reward[:, 1],
                "distance": found.distance,
            }
        )
        write_pictures(run / runs.STRIP, strip, {})


def drawn(run: Path, context: int = 1) -> bool:
    """Whether nothing is left to draw, of what is imagined behind so many rows."""
    return runs.is_sound(run / runs.MAP) and _has_strip(run, context)


def _has_strip(run: Path, context: int) -> bool:
    """Whether there is a film strip that begins where this context ends."""
    return runs.is_sound(run / runs.STRIP) and read_strip(run)["step"][0] == context


def read_map(run: Path) -> tuple[pl.DataFrame, dict[str, float | None]]:
    """A map that :func:`draw` wrote, and how well reward separates in it."""
    return pl.read_parquet(run / runs.MAP), json.loads(pl.read_parquet_metadata(run / runs.MAP)[SEPARATION])


def read_strip(run: Path) -> pl.DataFrame:
    """A film strip that :func:`draw` wrote."""
    return pl.read_parquet(run / runs.STRIP)


def webp(frame: NDArray[np.uint8], side: int) -> bytes:
    """A frame (H, W, 3) as a small picture."""
    data = BytesIO()
    Image.fromarray(frame).resize((side, side), Image.Resampling.BILINEAR).save(data, "WEBP", quality=QUALITY)
    return data.getvalue()


def _write_map(run: Path, frames: Store, rows: int, seed: int, device: str | torch.device) -> None:
    found = latent_map(run, rows=rows, seed=seed, device=device)
    seen: dict[int, NDArray[np.uint8]] = {
        number: frames.read_episode(number, ("frame",))["frame"][found.step[found.episode == number]]
        for number in np.unique(found.episode).tolist()
    }
    left = {number: iter(pictures) for number, pictures in seen.items()}
    points = {
        f"{method}_{axis}": place[:, index]
        for method, place in found.points.items()
        for index, axis in enumerate("xy")
    }
    table = pl.DataFrame(
        {
            "episode": found.episode,
            "step": found.step,
            "reward": found.reward,
            **points,
            "frame": [webp(next(left[number]), POINT) for number in found.episode.tolist()],
        }
    )
    write_pictures(run / runs.MAP, table, {SEPARATION: json.dumps(found.separation)})


def write_pictures(path: Path, table: pl.DataFrame, about: dict[str, str]) -> None:
    """A table of small pictures; its pages carry checksums, by which damage is seen."""
    data = BytesIO()
    arrow = table.to_arrow().replace_schema_metadata(about)
    parquet.write_table(arrow, data, compression="zstd", write_page_checksum=True)
    write_whole(path, data.getvalue())
