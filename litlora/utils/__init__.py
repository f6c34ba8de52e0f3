"""What every package may use and what knows nothing of models: files, locks, limits, signals, processes."""
