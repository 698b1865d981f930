"""Addresses that a user gives: refused at once where they cannot work, not after minutes."""

from __future__ import annotations

import logging
import os
import re
import socket
from pathlib import Path
from typing import Any

from pvrpipe.schemas.errors import ClusterError, InvalidValueError, one_line

SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*:/")  # pathlib makes one slash of two


def check_answers(address: str) -> None:
    """Refuse an address of a Ray cluster that nobody answers at; Ray itself goes on trying for minutes.

    Raises:
        ClusterError: nobody answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto" and the like are Ray's to resolve
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({one_line(error)}); check --address, or leave it out"
        ) from error


def ray_arguments(address: str | None) -> dict[str, Any]:
    """How ``ray.init`` is called everywhere here: at an address, at ``RAY_ADDRESS``, or on this machine.

    Raises:
        ClusterError: nobody answers at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        check_answers(address)
    return {
        "address": address or "local",  # None would join whatever cluster somebody runs on this machine
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }


def refuse_url(output: Path) -> None:
    """Refuse a URL where something is to be written: writers need a file system that can rename.

    Raises:
        InvalidValueError: it is one.
    """
    if SCHEME.match(str(output)):
        raise InvalidValueError(f"{output} is a URL; write to a local folder, then `pvrpipe push` it there")
