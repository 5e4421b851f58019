"""Grading: whether a response answers its problem, under limits of time and memory."""
