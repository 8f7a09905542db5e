"""Checkpoints that this project wrote under megatron-core 0.16.1: see README.md."""
