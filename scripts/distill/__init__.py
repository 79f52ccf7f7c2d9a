"""What the distillation scripts share: settings, cached samples, losses, the student, checkpoints and the loop."""
