"""Simulates how a policy would handle some traffic. The cost model gives the step times."""
