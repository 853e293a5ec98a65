"""Everything that measures. The product imports nothing from here."""
