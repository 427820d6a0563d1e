"""Traffic, and what a policy would make of it: a simulator on the cost model."""
