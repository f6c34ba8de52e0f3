"""What a checkpoint's folder lacks beside a GGUF file: config.json and the tokenizer, exact or refused."""
