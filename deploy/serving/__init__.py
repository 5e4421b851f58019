"""A trained model in use: responses in the terminal or in a file, and vLLM's server."""
