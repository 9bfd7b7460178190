"""Corpora, their documents, and the token ids made from them for calibration and evaluation."""
