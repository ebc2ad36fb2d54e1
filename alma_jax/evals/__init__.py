"""Benchmark files in and out: prompt sets, decoding presets, IFEval's checks, exports for the official tools."""
