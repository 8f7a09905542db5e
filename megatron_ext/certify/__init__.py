"""Is this layout right? The run's own code on a small model, on many ranks and on one."""
