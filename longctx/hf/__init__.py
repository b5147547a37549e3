"""Models as Hugging Face keeps them: read, written, compared. No transformers except to compare."""
