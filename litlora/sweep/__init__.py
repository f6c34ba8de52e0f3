"""Sweeps: which settings are tried, the study that records them, and the processes that train them.

A trial is an ordinary run of finetune_lora. Nothing here trains, and only `study` knows Optuna.
"""
