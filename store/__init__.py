"""The store: write, commit, read, windows, verify. Imports no ray."""
