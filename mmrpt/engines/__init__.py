"""What runs the method: our own loop in one process (`native`)."""
