"""Licences of weights, which travel with what they computed: which is the strictest, what the Hub calls it."""

from __future__ import annotations

from collections.abc import Iterable

#: From those that ask for least to those that ask for most, by their SPDX names.
BY_STRICTNESS = (
    "none",  # weights that nobody trained
    "CC0-1.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "Apache-2.0",
    "CC-BY-4.0",
    "CC-BY-SA-4.0",
    "CC-BY-NC-4.0",
    "CC-BY-NC-SA-4.0",
    "CC-BY-NC-ND-4.0",
)


def strictest(licences: Iterable[str]) -> str:
    """The licence that asks for most; of those that are not known here, all, joined by AND."""
    found = sorted(set(licences))
    unknown = [name for name in found if name not in BY_STRICTNESS]
    return " AND ".join(unknown) if unknown else max(found, key=BY_STRICTNESS.index)


def hub_licence(licence: str) -> str:
    """Its identifier in the metadata of the Hugging Face Hub."""
    return licence.lower() if licence in BY_STRICTNESS[1:] else "other"
