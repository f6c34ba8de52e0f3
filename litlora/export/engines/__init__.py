"""The programs that score a receipt's prompts beside litlora: each module imports one, which is an extra."""
