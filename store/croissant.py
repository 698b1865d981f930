"""``croissant.json``: a store in Croissant 1.1, the JSON-LD that dataset search and loaders read.

Every shard is a FileObject with its size and sha256, so that nobody downstream relies on a glob alone.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from pvrpipe.schemas.errors import CorruptStoreError
from pvrpipe.schemas.manifest import Column, Manifest
from pvrpipe.store.files import sha256_of
from pvrpipe.store.layout import MANIFEST, files_of

CONFORMS_TO = "http://mlcommons.org/croissant/1.1"
_SAME = (
    "arrayShape citeAs column containedIn equivalentProperty extract field fileObject fileProperty fileSet "
    "format includes isArray isLiveDataset jsonPath key md5 parentField path recordSet references regex "
    "repeated replace samplingRate separator source subField transform"
)
#: The standard context of Croissant 1.1.
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    **{word: f"cr:{word}" for word in _SAME.split()},
}
FORMATS = {
    ".parquet": "application/x-parquet",
    ".tar": "application/x-tar",
    ".json": "application/json",
    ".safetensors": "application/octet-stream",
}
TYPES = {
    "bool": "sc:Boolean",
    "uint8": "cr:UInt8",
    "int32": "cr:Int32",
    "float16": "cr:Float16",
    "float32": "cr:Float32",
    "float64": "cr:Float64",
}
BYTES = "sc:Text"  # Croissant has no other word for them, and its loader gives bytes
EPISODE_FIELDS = {
    "episode": "sc:Integer",
    "rows": "sc:Integer",
    "length": "sc:Integer",
    "episode_return": "sc:Float",
    "seed": "sc:Integer",
    "policy": "sc:Text",
    "variation": "sc:Text",
    "terminated": "sc:Boolean",
    "split": "sc:Text",
    "distribution": "sc:Text",
}
ROWS = (
    "One record per row: what was observed, the reward received on arriving, the action taken from there. "
    "Arrays in Parquet are bytes of fixed length, little-endian, in C order."
)
MEMBERS = "One record per episode: the .npy file of this column, a row per step."
LICENCE_UNSAID = "not stated by who made these rollouts"


def croissant(
    folder: Path, manifest: Manifest, url: str | None, creator: str, published: date
) -> dict[str, Any]:
    """The description of a store in a folder.

    Args:
        folder: where its files are.
        manifest: of the store.
        url: where it is published; contents are relative to it.
        creator: who made it.
        published: when.
    """
    made = manifest.embeddings
    what = f"embedded by {made.encoder.title}" if made is not None else "rollouts"
    size = f"{manifest.episodes} episodes, {manifest.rows} rows"
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": f"{manifest.rollouts.environment} {what}",
        "description": f"{size} of {manifest.rollouts.environment}, {what}.",
        "license": made.encoder.weights.licence if made is not None else LICENCE_UNSAID,
        "url": url or f"urn:sha256:{manifest.id}",
        "creator": {"@type": "sc:Person" if " " in creator else "sc:Organization", "name": creator},
        "datePublished": published.isoformat(),
        "version": f"1.{manifest.revision - 1}.0",
        "identifier": str(manifest.id),
        "citeAs": f"{creator}, store {str(manifest.id)[:16]}",
        **({"prov:wasDerivedFrom": {"@id": f"urn:sha256:{made.rollouts_id}"}} if made is not None else {}),
        "distribution": [*_files(folder, manifest, url), *_file_sets(manifest)],
        "recordSet": [_episodes(manifest), *_record_sets(manifest)],
    }


def _files(folder: Path, manifest: Manifest, url: str | None) -> list[dict[str, Any]]:
    """Every file with its size and hash; cards and commit records are not part of the data."""
    found = []
    for file in files_of(manifest):
        if file.entry is not None or file.optional:
            continue
        path = folder / file.name
        if not path.is_file():
            raise CorruptStoreError(
                f"{path} is missing; run `pvrpipe verify {folder}`, or get the store again"
            )
        found.append(
            {
                "@type": "cr:FileObject",
                "@id": file.name,
                "name": file.name,
                "contentUrl": f"{url.rstrip('/')}/{file.name}" if url else file.name,
                "contentSize": f"{path.stat().st_size} B",
                "encodingFormat": FORMATS.get(path.suffix, "application/octet-stream"),
                "sha256": sha256_of(path) if file.name == MANIFEST else file.sha256,
            }
        )
    return found


def _file_sets(manifest: Manifest) -> list[dict[str, Any]]:
    """What holds the rows: the shards, or in tars the members of each column."""
    if manifest.shard_format == "parquet":
        kind = {"encodingFormat": FORMATS[".parquet"], "includes": "shards/*.parquet"}
        return [{"@type": "cr:FileSet", "@id": "shards", "name": "shards", **kind}]
    tars = [{"@id": entry.file} for entry in manifest.shards]
    return [
        {
            "@type": "cr:FileSet",
            "@id": f"members-{c.name}",
            "name": f"members-{c.name}",
            "containedIn": tars,
            "encodingFormat": "application/octet-stream",
            "includes": f"*.{c.name}.npy",
        }
        for c in manifest.columns
    ]


def _episodes(manifest: Manifest) -> dict[str, Any]:
    fields = [
        _field(
            "episodes",
            name,
            kind,
            {"fileObject": {"@id": manifest.episodes_file}, "extract": {"column": name}},
        )
        for name, kind in EPISODE_FIELDS.items()
    ]
    return _records("episodes", "One record per episode.", fields) | {"key": {"@id": "episodes/episode"}}


def _record_sets(manifest: Manifest) -> list[dict[str, Any]]:
    """The rows; in tars, where a member holds a whole episode's, column by column."""
    if manifest.shard_format == "parquet":
        shards = {"fileSet": {"@id": "shards"}}
        fields = [_column(c, {**shards, "extract": {"column": c.name}}) for c in manifest.columns]
        return [_records("rows", ROWS, fields)]
    found = []
    for c in manifest.columns:
        source = {"fileSet": {"@id": f"members-{c.name}"}, "extract": {"fileProperty": "content"}}
        told = f"{c.dtype} {['rows', *c.shape]}, an .npy file"
        field = _field(f"rows-{c.name}", c.name, BYTES, source) | {"description": told}
        found.append(_records(f"rows-{c.name}", MEMBERS, [field]))
    return found


def _records(name: str, description: str, fields: list[dict[str, Any]]) -> dict[str, Any]:
    about = {"name": name, "description": description, "field": fields}
    return {"@type": "cr:RecordSet", "@id": name, **about}


def _column(column: Column, source: dict[str, Any]) -> dict[str, Any]:
    """A column of Parquet: arrays are bytes there, and whoever loads them as numbers fails."""
    if not column.shape:
        return _field("rows", column.name, TYPES[column.dtype], source)
    told = f"{column.dtype} {list(column.shape)}, little-endian, in C order"
    return _field("rows", column.name, BYTES, source) | {"description": told}


def _field(records: str, name: str, kind: str, source: dict[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{records}/{name}",
        "name": name,
        "dataType": kind,
        "source": source,
    }
