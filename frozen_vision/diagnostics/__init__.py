"""What explains how a backbone behaves: where heads look, how alike layers are, how flat its loss is."""
