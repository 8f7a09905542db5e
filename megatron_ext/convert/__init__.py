"""Hugging Face folders to Megatron checkpoints and back: name maps as tables."""
