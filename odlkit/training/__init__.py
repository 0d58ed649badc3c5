"""Fitting: greedy, one unit at a time, and joint, through the iteration."""
