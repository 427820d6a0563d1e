"""Shows a user what a running server does: events, metrics and the status page."""
