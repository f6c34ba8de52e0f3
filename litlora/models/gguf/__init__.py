"""GGUF files: reading them, what llama.cpp calls and computes for each family, and what a folder lacks beside one."""
