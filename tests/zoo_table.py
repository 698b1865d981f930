"""The table of docs/pvrs.md, from the specifications: ``python -m tests.zoo_table`` writes it anew."""

from __future__ import annotations

from pathlib import Path

from pvrpipe.pipeline.pvrs import Pvr
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.schemas.specifications import Recipe

DOCUMENT = Path(__file__).parent.parent / "docs" / "pvrs.md"
BEGIN, END = "<!-- the zoo -->\n", "<!-- the end of the zoo -->\n"
COLUMNS = ("name", "weights", "pinned", "frames", "within", "embedding", "D", "trained on", "licence")


def frames_of(recipe: Recipe) -> str:
    """A recipe in a few words."""
    if recipe.resize is None:
        return "as they are"
    how = f"{recipe.resize}{'²' if recipe.squash else ''} {recipe.interpolation}"
    how += "" if recipe.antialias else " without antialias"
    how += "" if recipe.rounded else ", float"
    return how if recipe.crop == recipe.resize and recipe.squash else f"{how}, crop {recipe.crop}"


def bound_of(recipe: Recipe) -> float:
    """Grey levels by which what a network sees may differ from the authors' pipeline.

    ``test_pipeline_preprocessing.py`` holds it for each recipe.
    """
    if recipe.resize is None:
        return 0
    return 2 if recipe.rounded else 0.001


def pin_of(pvr: Pvr) -> str:
    """What the file is known by."""
    source = pvr.source
    kinds = {"revision": source.revision, "sha256": source.sha256, "md5": source.md5}
    return ", ".join(kind for kind, value in kinds.items() if value) or "no"


def table() -> str:
    """One row for each representation."""
    rows = []
    for pvr in PVRS.values():
        marks = ("language", "sequential", "diverse")
        groups = [m for m in marks if getattr(pvr.properties, m)]
        trained = pvr.properties.trained_on + (f" ({', '.join(groups)})" if groups else "")
        embedding = pvr.pooling if pvr.layer == "last" else f"{pvr.pooling} of {pvr.layer}"
        frames, bound = frames_of(pvr.recipe), f"{bound_of(pvr.recipe):g}"
        where = f"`{pvr.source.repo}`" if pvr.source.repo else f"[{pvr.source.file}]({pvr.source.url})"
        cells = (
            f"`{pvr.name}`", where, pin_of(pvr), frames, bound, embedding, str(pvr.width), trained, pvr.licence,
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |\n")
    return f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n" + "".join(rows)


def with_table(text: str) -> str:
    """The document with the table of now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
