"""What runs the method: our own loop in one process (`native`), or TRL's GRPOTrainer on any number (`trl`)."""
