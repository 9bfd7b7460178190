"""Checkpoints that engines load: one file per format, and the verifier."""
