"""A trained model in the form of the release, or as a folder that transformers loads."""
