"""The Hugging Face Hub: downloading repositories, and the names of the files in a checkpoint folder."""
