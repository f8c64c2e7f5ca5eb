"""Scores, baselines and the board. Sibling of `training`: neither imports the other."""
