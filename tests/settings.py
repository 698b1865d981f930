"""What a store would say of a model, without a store."""

from __future__ import annotations

from pvrpipe.worldmodel.inputs import vector
from pvrpipe.worldmodel.models import Setting


def setting(width: int, action: int) -> Setting:
    """Embeddings of one vector, episodes of 500 transitions that never end before their time."""
    return Setting(vector(width), action, state=0, steps=500, episodic=False)
