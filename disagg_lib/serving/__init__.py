"""How TensorRT-LLM serves, as rules and latency tables: the rehearsal server and the simulation share both."""
