"""What ``tools/gpu_check.py`` checks and measures, a module for some parts each."""
