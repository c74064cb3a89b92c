"""The one place that drives accelerate and DeepSpeed: one small `Engine`, two backends."""
