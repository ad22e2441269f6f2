"""Histories: readers, the memory-mapped store, windows, and the synthetic generator."""
