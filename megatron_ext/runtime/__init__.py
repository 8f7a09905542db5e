"""Where a program runs, whatever it computes: ranks, devices, errors, files. See README.md."""
