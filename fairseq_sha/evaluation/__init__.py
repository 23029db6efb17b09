"""Evaluation: how a text is read for a score, and the one loop that reads it."""
