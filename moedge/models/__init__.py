"""What an MoE checkpoint is: its layers, experts, files and routing. Knows no cache, no limit."""
