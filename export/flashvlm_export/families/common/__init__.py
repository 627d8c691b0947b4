"""What families share: language models, pixels, saliency, tiles and the names of parameters."""
