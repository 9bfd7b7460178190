"""One run, whole, in the order of its stages: plan, load, baseline, quantize, export, evaluate, store."""
