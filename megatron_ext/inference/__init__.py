"""Programs that run a checkpoint forward and train nothing. See README.md."""
