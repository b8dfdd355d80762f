"""What every training stands on: files, checkpoints, processes, signals."""
