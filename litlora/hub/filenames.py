"""The names of the files in a checkpoint folder, as the Hub serves them."""

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # beside several files of weights
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt")  # whoever passes the weights on must pass these on too
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")  # endings of weights that are never read
