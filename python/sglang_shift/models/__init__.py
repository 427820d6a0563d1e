"""What is known of model architectures."""
