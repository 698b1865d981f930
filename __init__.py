"""pvrpipe: embed rollouts once with frozen visual representations, then train and probe world models."""

__version__ = "0.1.0"
