"""Documents of corpora, and the token ids made of them for calibration and evaluation."""
