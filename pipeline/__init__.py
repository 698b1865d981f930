"""Frozen encoders and the embedding stage: rollout store → embedding store per PVR."""
