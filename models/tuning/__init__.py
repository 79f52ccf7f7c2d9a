"""Tuning of timm models: pictures, and what schedules do to features and classes."""
