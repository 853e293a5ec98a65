"""What a person or a scheduler starts; each a thin module over `pipeline`."""
