"""What commands share: configuration files and overrides (configuration.py), help, mistakes, extras (commands.py)."""

from dynamic_llava.cli.configuration import choose_command, load_config, read_yaml

__all__ = ["choose_command", "load_config", "read_yaml"]
