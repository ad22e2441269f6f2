"""The promise: clip, noise, epsilon and their ledger, all from one plan."""
