"""Tokenizers, indexed datasets, batches. See README.md."""
