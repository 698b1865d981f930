"""The contract: records, axes, manifest, errors. Imports no torch and no ray."""
