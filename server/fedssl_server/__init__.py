"""The server door: our loop of rounds over a Flower Grid, and the admission of every upload."""
