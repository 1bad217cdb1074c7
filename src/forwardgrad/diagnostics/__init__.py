"""What an estimator costs: time, memory, operations."""
