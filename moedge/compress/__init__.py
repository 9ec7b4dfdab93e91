"""A smaller model for a task: which experts it needs, what is left without the others, and a report that shows it."""
