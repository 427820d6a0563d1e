"""What a user sees of a running server: events, metrics, the status page."""
