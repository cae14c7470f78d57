"""What the workers of a run share: ranks, collectives, devices, precision, and agreeing to stop."""
