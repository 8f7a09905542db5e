"""Megatron's checkpoint folders: find, check, read, write. See README.md."""
