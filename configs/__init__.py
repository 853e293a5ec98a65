"""Ready configurations, as YAML."""
