"""The training loop, its schedule and its logs."""
