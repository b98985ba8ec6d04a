"""`python -m genkit`, and what `torchrun -m genkit` and `accelerate launch -m genkit` start."""

from genkit.cli.app import main

if __name__ == "__main__":
    main()
