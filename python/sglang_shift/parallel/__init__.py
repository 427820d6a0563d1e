"""Divides a step among the ranks. It has the layout, the groups, the token-sharded region, and the exchange."""
