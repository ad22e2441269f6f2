"""Attacks: what somebody who sees uploads, models or releases learns about the people behind them. One file an attack."""
