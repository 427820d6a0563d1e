"""How a step is divided between ranks: the layout, the groups, the token-sharded region."""
