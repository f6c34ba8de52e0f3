"""Plots and the HTML page of a run. Reads what a run has written, and knows neither torch nor the training loop."""
