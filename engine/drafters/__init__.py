"""Drafters: guesses of how requests go on, cheap to make, that the model verifies several at a time."""
