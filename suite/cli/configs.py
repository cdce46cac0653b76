"""The commands about configs, which run nothing: config check, config schema."""
