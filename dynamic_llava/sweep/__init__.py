"""Runs a list of trainings and their evaluations and makes the paper's table of them."""
