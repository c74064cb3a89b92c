"""Demo data, made from nothing: pictures, speech and texts that a small model learns in minutes."""
