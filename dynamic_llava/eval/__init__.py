"""Evaluation: answers and perplexities through the ordinary pipeline, metrics, costs and the tables made of them."""
