"""Metrics as pure functions: no model, no files; each file names the protocol it follows."""
