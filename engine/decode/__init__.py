"""Deciding: what a row of logits becomes (sample) and when a request ends (stop)."""
