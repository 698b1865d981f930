"""The workspace: where each stage writes when no path is given, and which output the next one takes.

::

    data/                      --root, PVRPIPE_ROOT
    ├── rollouts/<env>         pvrpipe collect
    ├── pvrs/<env>-<name>      pvrpipe pretrain
    ├── embeddings/<env>/<pvr> pvrpipe embed
    └── runs/<name>            pvrpipe train-model, probe
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pvrpipe.schemas.errors import InvalidValueError, NotAStoreError, PvrpipeError
from pvrpipe.schemas.manifest import Manifest
from pvrpipe.store.layout import MANIFEST, read_manifest

RUN = "run.json"  # what makes a folder a training run


@dataclass(frozen=True)
class Workspace:
    """The folder that supplies defaults."""

    root: Path

    def rollouts(self, environment: str) -> Path:
        """Where rollouts of an environment go."""
        return self.root / "rollouts" / slug(environment)

    def label_of(self, store: str) -> str | None:
        """What a store of this workspace is called by its folders, which may say more than its environment does."""
        for stage in ("rollouts", "embeddings"):
            home = (self.root / stage).absolute()
            if Path(store).absolute().is_relative_to(home):
                return "-".join(Path(store).absolute().relative_to(home).parts)
        return None

    def pvr(self, environment: str, name: str) -> Path:
        """Where an encoder trained on an environment's frames goes."""
        return self.root / "pvrs" / f"{slug(environment)}-{slug(name)}"

    def embeddings(self, environment: str, pvr: str) -> Path:
        """Where embeddings of an environment go."""
        return self.root / "embeddings" / slug(environment) / slug(pvr)

    def home(self, manifest: Manifest) -> Path:
        """Where a store that was made elsewhere goes: to its like.

        Raises:
            InvalidValueError: its names are none for a folder.
        """
        environment, made = manifest.rollouts.environment, manifest.embeddings
        if made is None:
            names, folder = [environment], self.rollouts(environment)
        else:
            seed = made.encoder.weights.random_seed
            pvr = made.encoder.name + (f"-random-{seed}" if seed is not None else "")
            names, folder = [environment, pvr], self.embeddings(environment, pvr)
        if not all(re.fullmatch(r"[\w-][\w.+-]{0,127}", slug(name)) for name in names):
            raise InvalidValueError(f"the store calls itself {names}; give a FOLDER to pull it into")
        return folder

    def run(self, name: str) -> Path:
        """Where a training run goes."""
        return self.root / "runs" / slug(name)

    def newest_rollouts(self) -> Path:
        """The rollout store that was sealed last."""
        return self._newest("rollouts", "rollouts", "make one with `pvrpipe collect`")

    def newest_embeddings(self) -> Path:
        """The embedding store that was sealed last."""
        return self._newest("embeddings", "embeddings", "make one with `pvrpipe embed --pvr NAME`")

    def newest_run(self) -> Path:
        """The run whose record was written last."""
        runs = latest_first((self.root / "runs").glob(f"*/{RUN}"))
        if not runs:
            raise NotAStoreError(
                f"there is no run in {self.root / 'runs'}; make one with `pvrpipe train-model`"
            )
        return runs[0].parent

    def _newest(self, folder: str, kind: str, cure: str) -> Path:
        for manifest in latest_first((self.root / folder).rglob(MANIFEST)):
            try:
                found = read_manifest(manifest.parent)
            except PvrpipeError:
                continue
            if found.kind == kind and found.state == "sealed":
                return manifest.parent
        raise NotAStoreError(
            f"there is no finished {kind} store in {self.root / folder}; {cure}, or give its path"
        )


def slug(name: str) -> str:
    """A name as a folder: ``dmc:pendulum-swingup`` is ``dmc-pendulum-swingup``."""
    return re.sub(r"[:/?=&,~@]", "-", name)


def latest_first(files: Iterable[Path]) -> list[Path]:
    """Files by the time of their last change; of equal times, the last name first."""
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, str(file)), reverse=True)
