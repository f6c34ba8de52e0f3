"""GGUF files: reading them, and what llama.cpp calls and computes for each family. Writes no file."""
