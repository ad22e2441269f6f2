"""Personal heads: trained on the device, kept there, never sent."""
