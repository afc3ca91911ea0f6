"""Generated images and clips with exact answers, for runs with nothing to download."""
