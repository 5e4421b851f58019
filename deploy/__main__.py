"""`python -m deploy`: the same as `latent-grpo`, for jobs whose working folder is the checkout."""

from deploy.cli import main

if __name__ == "__main__":
    main()
