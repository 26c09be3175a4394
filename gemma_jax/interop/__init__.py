"""Other people's files: Hugging Face folders and GGUF, in and out."""
