"""The training loop (`train.py` reads from top to bottom), and what only the loop uses."""
