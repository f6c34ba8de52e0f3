"""What any package may need and what knows nothing of models: files, locks, limits, signals, processes."""
