"""What a model is worth (perplexity, tasks, KL) and what its router does (load, entropy, consistency)."""
