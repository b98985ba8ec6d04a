"""Data only: recipes of distillations, and in `reproduce` those of published figures (`genkit reproduce`)."""
