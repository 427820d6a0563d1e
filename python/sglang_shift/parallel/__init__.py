"""How ranks divide a step: the layout of the ranks, their groups, the token-sharded region, and the exchange."""
