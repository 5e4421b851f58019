"""Entry point of `python -m deploy`, which equals `latent-grpo`, for jobs whose working folder is the checkout."""

from latent_grpo.deploy.cli.app import main

if __name__ == "__main__":
    main()
