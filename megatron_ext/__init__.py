"""LLM pruning and distillation on megatron-core (Minitron, arXiv 2407.14679)."""
