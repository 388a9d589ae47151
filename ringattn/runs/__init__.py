"""The run directory (checkpoints, metrics, description) and the progress display."""
