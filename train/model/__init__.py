"""Model parts. Imports only torch, transformers, `data.sample` and `data.geometry`."""
