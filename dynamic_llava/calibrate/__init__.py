"""What a keep rate is worth in a trained model, measured on held data: `python -m dynamic_llava.calibrate`."""
