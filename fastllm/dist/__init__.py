"""Training on many ranks: who they are (mesh), what they exchange (collectives), ZeRO (zero)."""
