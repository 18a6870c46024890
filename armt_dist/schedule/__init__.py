"""What is known before a GPU is asked for: order of work, cost, memory. No torch."""
