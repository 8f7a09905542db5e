"""Flags: what each program accepts, as frozen dataclasses. See README.md."""
