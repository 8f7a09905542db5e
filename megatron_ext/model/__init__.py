"""An `Arch` as one of megatron-core's models on this rank. See README.md."""
