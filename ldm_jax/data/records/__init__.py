"""A latent cache on disk: what it is, its writing, its reading."""
