"""The KV cache at each level: one memory, its layout at the level, and the exchange that turns one into another."""
