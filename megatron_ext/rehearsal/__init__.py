"""What a run will do and cost, before it does. See README.md."""
