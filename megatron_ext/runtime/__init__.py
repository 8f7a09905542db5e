"""The ground of every program, whatever it computes: ranks, devices, errors, files."""
