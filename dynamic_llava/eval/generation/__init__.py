"""The benchmarks of answer quality (Tables 3, 8, 17): perplexity in one pass, METEOR over a live cache, item lists."""
