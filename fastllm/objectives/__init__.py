"""What a model is trained to do: one file an objective, each a Config and a pure loss."""
