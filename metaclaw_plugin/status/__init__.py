"""What runs and what is learned, read from the store, the processes and the trainer without disturbing any of them."""
