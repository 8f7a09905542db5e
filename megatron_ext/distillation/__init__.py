"""Losses between teacher and student, and the two models side by side."""
