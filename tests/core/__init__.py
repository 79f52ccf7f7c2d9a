"""What every backend and adapter stands on: layouts, plans, attention, files, the package."""
