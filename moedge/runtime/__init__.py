"""Run an MoE within a memory limit: budget, expert store and cache, experts forward, generation."""
