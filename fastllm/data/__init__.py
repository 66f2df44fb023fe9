"""Text to batches: sources -> tokenizer -> prepared token files -> packing -> collate -> loader."""
