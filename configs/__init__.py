"""Example configurations in YAML."""
