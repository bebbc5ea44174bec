"""Other libraries' interfaces on this engine: a user changes one import and keeps the rest of the script."""
