"""How checkpoints/mini is made: sources, tokenizer, tasks, run, evaluation. See README.md."""
