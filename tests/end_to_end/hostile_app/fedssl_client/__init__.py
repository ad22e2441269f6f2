"""Shadows the package that is installed on the device."""
