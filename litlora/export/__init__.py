"""What others read of an adapter: its model card. Knows no model and no training loop."""
