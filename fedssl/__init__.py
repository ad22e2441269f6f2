"""fedssl: recommendations learned from people's histories that never leave their devices."""

__version__ = "0.1.0"
