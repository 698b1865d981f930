"""Environments, policies and collection: environment → rollout store."""
