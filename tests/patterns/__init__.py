"""Each pattern's geometry against its definition."""
