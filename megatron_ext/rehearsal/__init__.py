"""Rehearsal of a run: its steps and its cost, before it starts. See README.md."""
