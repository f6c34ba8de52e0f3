"""Layers and functions that a transformer is built of, and the backend that runs them on a device.

Nothing here knows a model family, an adapter or a file.
"""
