"""Several methods on the same questions, in one table: quality, its difference to dense, and what it costs."""
