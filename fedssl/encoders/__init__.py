"""Sequence encoders, one a file, written with the operations of the users axis."""
