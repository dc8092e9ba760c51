"""The stand-in for TensorRT-LLM's servers: the same command line, configuration and HTTP, no GPU.

Comes in: config.yaml as the real one reads it, requests. Goes out: answers at the pace of the serving model, and faults
on purpose. All that is measured on it is `rehearsed`.
"""
