"""Text: where a corpus comes from, its tokenizers, and the tokens on disk."""
