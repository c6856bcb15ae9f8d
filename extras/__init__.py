"""Floor 4, beyond the method: circuits of tasks, the Llama family, ablations, timings. Nothing below knows it."""
