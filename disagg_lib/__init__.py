"""Reproduce MLPerf v5.1 Llama-3.1-405B on disaggregated TensorRT-LLM: plan, rehearse, launch, judge."""
