"""Scores, plans and trimming."""
