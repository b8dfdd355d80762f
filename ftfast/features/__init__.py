"""What layers of a model return while it runs, and as the feature maps that Factor Transfer takes."""
