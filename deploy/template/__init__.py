"""The files of `latent-grpo init`: a project of the user, which imports from here as any other does."""
