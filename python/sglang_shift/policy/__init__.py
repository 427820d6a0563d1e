"""When a step runs in which mode: the policies, and the selector that asks them."""
