"""What others read of an adapter: its model card, and what servers load of it. Knows no training loop."""
