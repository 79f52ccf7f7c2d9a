"""diffusers pipelines as what `visattn.tuning` tunes: dense twins, injected schedules, errors inside layers."""
