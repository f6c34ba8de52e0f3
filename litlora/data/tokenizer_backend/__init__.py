"""What tokenizes a text: tokenizer.json or a sentencepiece model, read within limits; nothing about prompts."""
