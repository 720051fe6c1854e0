"""Entry point: `python -m dynamic_llava.tiny.train_base configs/tiny_base.yaml`; see __main__.py."""
