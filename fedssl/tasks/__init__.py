"""Pretext tasks, one a file: each says how its views are drawn and what its loss is."""
