"""Commands beside the server: benchmark, planner, GPU checks, terminal view, port check."""
