"""GGUF files for llama.cpp and Ollama: a model or an adapter with metadata and tokenizer. Reads no adapter folder."""
