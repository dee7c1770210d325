"""What is lost at a budget, with a method, at a length, on a task, and what is gained: grids, measures, statistics."""
