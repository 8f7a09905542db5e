"""Checks and measurements of ``tools/gpu_check.py``, a module for some parts each."""
