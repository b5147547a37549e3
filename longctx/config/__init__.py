"""Schema, composition and checks of the configuration."""
