"""What an estimator costs (time, memory, operations), and how far its estimates are from the gradient."""
