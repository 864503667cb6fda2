"""Thin absl programs: each asks one question, and opens with its command, its time and what to expect."""
