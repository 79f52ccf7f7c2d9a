"""Distillation: settings, cached samples, losses, the student, checkpoints and the loop."""
