"""Tasks, data, runs and the loop that trains on them."""
