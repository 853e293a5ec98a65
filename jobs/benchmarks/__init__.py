"""Everything that measures: `cvt-label benchmark`. The product imports nothing from here."""
