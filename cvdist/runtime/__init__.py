"""How worker processes start, and what they offer to the training loop."""
