"""pvrpipe: embed rollouts once with frozen visual representations, then train and probe world models."""

import os

__version__ = "0.1.0"

# Read when torch is loaded, so set before. Threads that wait for each other then sleep instead of spinning: where
# anything else runs on the processors, an update by two threads takes an eighth of the time (docs/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
