"""The roof: simulation on one machine, baselines, reports, and the fedssl command."""
